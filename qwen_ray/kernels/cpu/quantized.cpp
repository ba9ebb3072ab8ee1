// out = x w^T + bias with weights in 8 bits; see `quantized.py` for how they are packed.
//
// Activations are rounded to 16 bits first, each 512 of a row to a scale of their own, and multiplied in two halves.
// Products are integers, exact, and only sums of 512 meet the scales. Rows of weights and of x are as independent of each
// other as in `tile.h`.
#include <memory>

#include "rounding.h"
#include "team.h"
#include "tile.h"

namespace {

constexpr int GROUP = 64;                   // bytes of a register
constexpr int64_t PIECE_BYTES = 64 << 10;   // of weights that a thread takes at a time
constexpr int64_t MOST_ROWS = 256;          // of x that are rounded at once

// What the bytes of weights are too large by is known beforehand, and so is its part of the sums: `starts`.
constexpr int OFFSET = 128;

// Rows of x in 16 bits: 256 times a byte, and another.
struct Rounded16 {
    static constexpr int STEPS = 8, SIZE = STEPS * GROUP;
    struct alignas(64) Group {
        int8_t high[STEPS][GROUP], low[STEPS][GROUP];
        int32_t starts[16];
        float scale;
    };
    int64_t num_groups;
    std::unique_ptr<Group[]> groups;  // [rows, num_groups]

    Rounded16(int64_t num_rows, int64_t num_steps)
        : num_groups((num_steps + STEPS - 1) / STEPS), groups(new Group[num_rows * num_groups]) {}

    template <class T>
    void take(int64_t row, const T* from, int64_t size) {
        for (int64_t g = 0; g < num_groups; ++g) {
            constexpr int VECTORS = SIZE / 16;
            f32x16 v[VECTORS], most{}, spoilt{};
            for (int i = 0; i < VECTORS; ++i) {
                v[i] = load_up_to_16(from + g * SIZE + 16 * i, size - g * SIZE - 16 * i);
                most = larger(larger(most, v[i]), -v[i]);
                spoilt += v[i] - v[i];  // 0, or NaN where one is not finite
            }
            Scale scale(most, spoilt, 127.0f * 256.0f);
            Group& to = groups[row * num_groups + g];
            i32x16 total{};
            for (int i = 0; i < VECTORS; ++i) {
                i32x16 whole = nearest(v[i] * scale.inverse), low = (whole << 24) >> 24;
                save(to.high[0] + 16 * i, __builtin_convertvector((whole - low) >> 8, i8x16));
                save(to.low[0] + 16 * i, __builtin_convertvector(low, i8x16));
                total += whole;
            }
            save(to.starts, total * -OFFSET);
            to.scale = scale.value;
        }
    }
};

struct Weights {
    const uint8_t* values;
    int64_t row_bytes;
};

// Lane c * R + r: row first + r of the weights times row column + c of x.
template <int R, int C>
[[gnu::noinline]] f32x16 tile(const Weights& w, int64_t first, const Rounded16& x, int64_t column, int64_t ahead) {
    f32x16 sums[R * C] = {};
    const uint8_t* rows = w.values + first * w.row_bytes;
    for (int64_t g = 0, left = w.row_bytes / GROUP; g < x.num_groups; ++g, left -= Rounded16::STEPS) {
        const Rounded16::Group* groups[C];
        for (int c = 0; c < C; ++c) groups[c] = &x.groups[(column + c) * x.num_groups + g];
        i32x16 whole[R * C] = {};
        int steps = left < Rounded16::STEPS ? left : Rounded16::STEPS;
        auto add = [&](auto half, int k) __attribute__((always_inline)) {
            u32x16 a[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint8_t* at = rows + r * w.row_bytes + (g * Rounded16::STEPS + k) * GROUP;
                if (!half) __builtin_prefetch(at + ahead);
                a[r] = load<u32x16>(at);
            }
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                i32x16 b = load<i32x16>(half ? groups[c]->low[k] : groups[c]->high[k]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) whole[c * R + r] = multiply_add(whole[c * R + r], a[r], b);
            }
        };
        for (int k = 0; k < steps; ++k) add(std::false_type{}, k);
#pragma GCC unroll 16
        for (int i = 0; i < R * C; ++i) whole[i] <<= 8;
        for (int k = 0; k < steps; ++k) add(std::true_type{}, k);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            i32x16 start = load<i32x16>(groups[c]->starts);
            f32x16 scale = fill(groups[c]->scale);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sums[c * R + r] += __builtin_convertvector(whole[c * R + r] + start, f32x16) * scale;
        }
    }
    return add_lanes<R * C>(sums);
}

template <int R>
inline f32x16 tile_of(int width, const Weights& w, int64_t first, const Rounded16& x, int64_t column, int64_t ahead) {
    if constexpr (COLUMNS == 4) {
        if (width == 4) return tile<R, 4>(w, first, x, column, ahead);
        if (width == 3) return tile<R, 3>(w, first, x, column, ahead);
    }
    return width == 2 ? tile<R, 2>(w, first, x, column, ahead) : tile<R, 1>(w, first, x, column, ahead);
}

template <int N, class T>
inline void rows(const Weights& w, const float* scales, int64_t row, const Rounded16& x, int64_t num_columns,
                 const T* bias, T* out, int64_t out_size) {
    for (int64_t c = 0; c < num_columns; c += COLUMNS) {
        int width = num_columns - c < COLUMNS ? num_columns - c : COLUMNS;
        f32x16 v = tile_of<N>(width, w, row, x, c, c == 0 ? ROWS * w.row_bytes : 0);
        v *= gather<float, N>(width, [&](int) { return scales + row; });
        if (bias) v += gather<T, N>(width, [&](int) { return bias + row; });
        scatter<T, N>(v, width, [&](int j) { return out + (c + j) * out_size + row; });
    }
}

template <class T>
void multiply_eight_bits(Team& team, const T* x, int64_t x_stride, const Matrix& matrix, T* out, int64_t num_rows) {
    Weights w{(const uint8_t*)matrix.values, matrix.row_bytes};
    const T* bias = (const T*)matrix.bias;
    const float* scales = (const float*)matrix.scales;
    int64_t size = matrix.size, out_size = matrix.out_size;
    int64_t piece = PIECE_BYTES / (w.row_bytes + 1) / ROWS * ROWS;
    piece = piece < ROWS ? ROWS : piece;
    int64_t num_pieces = (out_size + piece - 1) / piece;
    for (int64_t begin = 0; begin < num_rows; begin += MOST_ROWS) {
        int64_t count = num_rows - begin < MOST_ROWS ? num_rows - begin : MOST_ROWS;
        auto take = [&](Rounded16& to, int64_t c) { to.take(c, x + (begin + c) * x_stride, size); };
        auto own = made_ready<Rounded16>(team, count, take, w.row_bytes / GROUP);
        T* to = out + begin * out_size;
#pragma omp for schedule(dynamic) nowait
        for (int64_t p = 0; p < num_pieces; ++p) {
            int64_t r = p * piece, end = r + piece < out_size ? r + piece : out_size;
            for (; r + ROWS <= end; r += ROWS) rows<ROWS>(w, scales, r, *own, count, bias, to, out_size);
            for (; r < end; ++r) rows<1>(w, scales, r, *own, count, bias, to, out_size);
        }
    }
    team.meet();
}

}  // namespace

template <class T>
void multiply_packed(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    if (w.bits == 4) return multiply_four_bits(team, x, x_stride, w, out, num_rows);
    multiply_eight_bits(team, x, x_stride, w, out, num_rows);
}
template void multiply_packed<float>(Team&, const float*, int64_t, const Matrix&, float*, int64_t);
template void multiply_packed<bf16>(Team&, const bf16*, int64_t, const Matrix&, bf16*, int64_t);
