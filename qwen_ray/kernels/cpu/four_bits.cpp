// out = x w^T + bias with weights in 4 bits; see `quantized.py` for how they are packed.
//
// Sixteen rows of weights lie side by side, four columns of each in turn: a lane of a register is a row, so scales need
// no spreading and sums no adding up of lanes. Activations are rounded to 8 bits first, each 64 of a row to a scale of
// their own, and four of a row at a time meet all lanes. Products of 32 columns are integers, exact; then they meet the
// scales. Rows of x are independent of each other: one is computed alike whatever is computed beside it.
#include <memory>

#include "rounding.h"
#include "team.h"

namespace {

constexpr int LANES = 16, GROUP = 64, HALF = GROUP / 2;  // rows of a block; columns that share an activation's scale
constexpr int64_t GROUP_BYTES = LANES * GROUP / 2;       // of a block
constexpr int64_t PIECE_BYTES = 64 << 10;                // of weights that a thread takes at a time
constexpr int64_t MOST_ROWS = 256;                       // of x that are rounded at once
#if defined(__AVX512F__)
constexpr int COLUMNS = 8;  // of 32 registers 24 hold sums
#else
constexpr int COLUMNS = 2;
#endif

// Rows of x in 8 bits, and the totals of what meets a group of weights.
struct Rounded8 {
    struct alignas(64) Group {
        int8_t values[GROUP];
    };
    int64_t num_groups, num_totals, total_size;
    std::unique_ptr<Group[]> groups;   // [rows, num_groups]
    std::unique_ptr<float[]> scales;   // [rows, num_groups]
    std::unique_ptr<float[]> totals;   // [rows, num_totals rounded up to 16]

    Rounded8(int64_t num_rows, int64_t num_steps, int64_t total_size)
        : num_groups(num_steps),
          num_totals((num_steps * GROUP / total_size + 15) / 16 * 16),
          total_size(total_size),
          groups(new Group[num_rows * num_groups]),
          scales(new float[num_rows * num_groups]),
          totals(new float[num_rows * num_totals]()) {}

    template <class T>
    void take(int64_t row, const T* from, int64_t size) {
        for (int64_t g = 0; g < num_groups; ++g) {
            f32x16 v[4], most{}, spoilt{};
            for (int i = 0; i < 4; ++i) {
                v[i] = load_up_to_16(from + g * GROUP + 16 * i, size - g * GROUP - 16 * i);
                most = larger(larger(most, v[i]), -v[i]);
                spoilt += v[i] - v[i];
            }
            Scale scale(most, spoilt, 127.0f);
            for (int i = 0; i < 4; ++i) {
                i32x16 whole = nearest(v[i] * scale.inverse);
                save(groups[row * num_groups + g].values + 16 * i, __builtin_convertvector(whole, i8x16));
                totals[row * num_totals + (g * GROUP + 16 * i) / total_size] +=
                    sum(__builtin_convertvector(whole, f32x16)) * scale.value;
            }
            scales[row * num_groups + g] = scale.value;
        }
    }
};

// Blocks of rows: values [columns / 8][LANES][4], scales and least values [groups][LANES].
struct Block {
    const uint8_t* values;
    const fp16 *scales, *least;
    int group;
};

// C rows of x from `column` on times the block's rows: sums[c], a lane to each row of weights.
template <int C>
[[gnu::noinline]] void tile(const Block& w, const Rounded8& x, int64_t column, f32x16* to) {
    f32x16 sums[C] = {};
    for (int64_t g = 0; g < x.num_groups; ++g) {
        const uint8_t* bytes = w.values + g * GROUP_BYTES;
        f32x16 both[C] = {};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            i32x16 whole[C] = {};
#pragma GCC unroll 4
            for (int k = 0; k < HALF; k += 8) {
                u32x16 packed = load<u32x16>(bytes + (half * HALF + k) * LANES / 2);
                u32x16 low = packed & 0x0f0f0f0fu, high = (packed >> 4) & 0x0f0f0f0fu;
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) {
                    const int8_t* four = x.groups[(column + c) * x.num_groups + g].values + half * HALF + k;
                    whole[c] = multiply_add(whole[c], low, i32x16{} + load<int32_t>(four));
                    whole[c] = multiply_add(whole[c], high, i32x16{} + load<int32_t>(four + 4));
                }
            }
            int64_t start = g * GROUP + half * HALF, of_scales = start / w.group;
            f32x16 scale = Row<fp16>::load16(w.scales + of_scales * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) both[c] += __builtin_convertvector(whole[c], f32x16) * scale;
            if (start % w.group == 0) {
                f32x16 least = Row<fp16>::load16(w.least + of_scales * LANES);
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) sums[c] += least * x.totals[(column + c) * x.num_totals + of_scales];
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[c] += both[c] * x.scales[(column + c) * x.num_groups + g];
    }
    for (int c = 0; c < C; ++c) to[c] = sums[c];
}

int tile_of(int64_t left, const Block& w, const Rounded8& x, int64_t column, f32x16* to) {
    if constexpr (COLUMNS == 8) {
        if (left >= 8) return tile<8>(w, x, column, to), 8;
        if (left >= 4) return tile<4>(w, x, column, to), 4;
    }
    if (left >= 2) return tile<2>(w, x, column, to), 2;
    return tile<1>(w, x, column, to), 1;
}

}  // namespace

template <class T>
void multiply_four_bits(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    int64_t size = w.size, out_size = w.out_size, num_groups = w.row_bytes * 2 / GROUP;
    int64_t block_bytes = w.row_bytes * LANES, block_scales = w.row_bytes * 2 / w.group * LANES;
    int64_t num_blocks = (out_size + LANES - 1) / LANES;
    int64_t piece = PIECE_BYTES / (block_bytes + 1);  // no bytes: more ranks than columns to cut
    piece = piece < 1 ? 1 : piece;
    int64_t num_pieces = (num_blocks + piece - 1) / piece;
    const T* bias = (const T*)w.bias;
    for (int64_t begin = 0; begin < num_rows; begin += MOST_ROWS) {
        int64_t count = num_rows - begin < MOST_ROWS ? num_rows - begin : MOST_ROWS;
        auto take = [&](Rounded8& to, int64_t c) { to.take(c, x + (begin + c) * x_stride, size); };
        auto own = made_ready<Rounded8>(team, count, take, num_groups, int64_t(w.group));
#pragma omp for schedule(dynamic) nowait
        for (int64_t p = 0; p < num_pieces; ++p) {
            int64_t end = (p + 1) * piece < num_blocks ? (p + 1) * piece : num_blocks;
            for (int64_t b = p * piece; b < end; ++b) {
                Block block{(const uint8_t*)w.values + b * block_bytes, (const fp16*)w.scales + b * block_scales,
                            (const fp16*)w.least + b * block_scales, w.group};
                int64_t row = b * LANES, rows = out_size - row;
                f32x16 add = bias ? load_up_to_16(bias + row, rows) : f32x16{};
                for (int64_t c = 0; c < count;) {
                    f32x16 v[COLUMNS];
                    int width = tile_of(count - c, block, *own, c, v);
                    for (int j = 0; j < width; ++j, ++c)
                        save_up_to_16(out + (begin + c) * out_size + row, bias ? v[j] + add : v[j], rows);
                }
            }
        }
    }
    team.meet();
}
template void multiply_four_bits<float>(Team&, const float*, int64_t, const Matrix&, float*, int64_t);
template void multiply_four_bits<bf16>(Team&, const bf16*, int64_t, const Matrix&, bf16*, int64_t);
