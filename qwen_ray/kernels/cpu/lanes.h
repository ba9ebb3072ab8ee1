// out = x w^T + bias with weights that are whole numbers of few bits; see `quantized.py` for how they are packed.
//
// Sixteen rows of weights lie side by side, four columns of each in turn: a lane of a register is a row, so scales need
// no spreading and sums no adding up of lanes, and four activations at a time meet all lanes. Activations are rounded to
// whole numbers first (`Rounded`). Products of a part of a group are integers, exact; then they meet the scales. Rows of
// x are independent of each other: one is computed alike whatever is computed beside it.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "rounding.h"
#include "team.h"

namespace {

constexpr int LANES = 16, GROUP = 64;       // rows of a block; columns that share an activation's scale
constexpr int QUADS = GROUP / 4;            // four columns each
constexpr int64_t PIECE_BYTES = 16 << 10;   // of weights: what a thread takes at least, large pieces first
constexpr int64_t MOST_ROWS = 256;          // of x that are rounded at once, if all of them stay in a core's own cache
static_assert(FEW_ROWS <= MOST_ROWS, "of a share among several, all at once");
constexpr int64_t CACHE_BYTES = 768 << 10;
constexpr int64_t PART = 16;                // groups of a row, that are multiplied before its next part
#if defined(__AVX512F__)
constexpr int COLUMNS = 6, BLOCKS = 2;  // rows of x and blocks at once: of 32 registers 24 hold sums
#else
constexpr int COLUMNS = 2, BLOCKS = 1;
#endif

// Rows of x as whole numbers. A group's scale lets a byte reach as far as its largest activation, or 6 times their mean
// size if that is less: so one that stands out does not cost the others their precision. It has a second byte, 256 times
// as much, and is one of the row's `Spike`s. COLUMNS rows lie beside each other, group by group.
class Rounded {
  public:
    struct alignas(64) Group {
        int8_t values[COLUMNS][GROUP];
        float scales[COLUMNS];
        float totals[COLUMNS][2];  // of each half of a row: whole numbers, spikes and all
    };
    struct Spike {
        int32_t four, bytes;  // columns 4 * four and the next three: their second bytes
        float scale;
    };

    Rounded(int64_t num_rows, int64_t num_groups)
        : num_groups(num_groups),
          groups(new Group[(num_rows + COLUMNS - 1) / COLUMNS * num_groups]),
          spikes(new Spike[num_rows * num_groups * QUADS]),
          num_spikes(new int64_t[num_rows]) {}

    // Those of row `first` and the rows beside it, of which it is the first.
    const Group* of(int64_t first) const { return groups.get() + first / COLUMNS * num_groups; }

    // add(spike), for each of a row.
    template <class Add>
    void each_spike(int64_t row, Add add) const {
        const Spike* own = spikes.get() + row * num_groups * QUADS;
        for (int64_t i = 0; i < num_spikes[row]; ++i) add(own[i]);
    }

    template <class T>
    void take(int64_t row, const T* from, int64_t size) {
        num_spikes[row] = 0;
        for (int64_t g = 0; g < num_groups; ++g) take_group(row, g, from + g * GROUP, size - g * GROUP);
    }

  private:
    static constexpr float USUAL = 6.0f;

    template <class T>
    void take_group(int64_t row, int64_t g, const T* from, int64_t size) {
        Group& to = groups[row / COLUMNS * num_groups + g];
        int64_t c = row % COLUMNS;
        f32x16 v[4], most{}, sizes{}, spoilt{};
        for (int i = 0; i < 4; ++i) {
            v[i] = load_up_to_16(from + 16 * i, size - 16 * i);
            f32x16 positive = larger(v[i], -v[i]);
            most = larger(most, positive);
            sizes += positive;
            spoilt += v[i] - v[i];  // 0, or NaN where one is not finite
        }
        float reach = largest(most), usual = sum(sizes) * (USUAL / float(size < GROUP ? size : GROUP));
        float scale = (reach > usual ? usual : reach) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        to.scales[c] = scale + sum(spoilt);
        for (int half = 0; half < 2; ++half) {
            i32x16 total{};
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                i32x16 whole = nearest(v[i] * inverse);
                total += whole;
                save(to.values[c] + 16 * i, low_byte(whole));
                if (reach > usual) take_spikes(row, g, i, (whole - ((whole << 24) >> 24)) >> 8);
            }
            to.totals[c][half] = sum(to_float(total));
        }
    }

    void take_spikes(int64_t row, int64_t g, int i, i32x16 high) {
        i8x16 bytes = low_byte(high);
        for (int q = 0; q < 4; ++q) {
            int32_t four = load<int32_t>((const int8_t*)&bytes + 4 * q);
            float scale = groups[row / COLUMNS * num_groups + g].scales[row % COLUMNS];
            if (four)
                spikes[row * num_groups * QUADS + num_spikes[row]++] = {int32_t(g * QUADS + 4 * i + q), four, scale * 256.0f};
        }
    }

    int64_t num_groups;
    std::unique_ptr<Group[]> groups;  // [rows / COLUMNS, num_groups]
    std::unique_ptr<Spike[]> spikes;  // [rows, num_groups * QUADS]
    std::unique_ptr<int64_t[]> num_spikes;
};

// C rows of x times B blocks of weights: sums[b * C + c] has those over what is before group `first`, and gets those
// up to `end`, a lane to each row of weights. W is some blocks that follow each other:
//   PARTS                               of a group, whose products are integers until they meet the scales
//   fours<C>(b, g, q, u32x16 (&two)[2]) of block b, columns 4 q to 4 q + 7 of group g, without a sign
//   add<C>(sums, whole, b, g, part, x)  `whole`: the sums over a part's columns
//   spike(b, spike)                     its part of a sum
//   finish(b, sums)
template <class W, int C, int B>
[[gnu::noinline]] void tile(const W& w, const Rounded::Group* x, int64_t first, int64_t end, f32x16* kept) {
    constexpr int OF_PART = QUADS / W::PARTS;
    f32x16 sums[B][C];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[b][c] = kept[b * C + c];
    for (int64_t g = first; g < end; ++g) {
        const Rounded::Group& group = x[g];
#pragma GCC unroll 2
        for (int part = 0; part < W::PARTS; ++part) {
            i32x16 whole[B][C] = {};
#pragma GCC unroll 8
            for (int q = part * OF_PART; q < (part + 1) * OF_PART; q += 2) {
                u32x16 two[B][2];
#pragma GCC unroll 2
                for (int b = 0; b < B; ++b) w.template fours<C>(b, g, q, two[b]);
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        i32x16 four = i32x16{} + load<int32_t>(group.values[c] + 4 * (q + i));
#pragma GCC unroll 2
                        for (int b = 0; b < B; ++b) whole[b][c] = multiply_add(whole[b][c], two[b][i], four);
                    }
            }
#pragma GCC unroll 2
            for (int b = 0; b < B; ++b) w.template add<C>(sums[b], whole[b], b, g, part, group);
        }
    }
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) kept[b * C + c] = sums[b][c];
}

template <class W, int B, int C = COLUMNS, class... Arguments>
inline void tile_of(int count, Arguments... arguments) {
    if constexpr (C > 1)
        if (count < C) return tile_of<W, B, C - 1>(count, arguments...);
    tile<W, C, B>(arguments...);
}

// Of shares: where the rows of each begin in `Rounded`, a multiple of COLUMNS.
struct Begins {
    std::vector<int64_t> of;
    int64_t end = 0;

    Begins(const Share* shares, int64_t num_shares) : of(num_shares) {
        for (int64_t s = 0; s < num_shares; ++s) {
            of[s] = end;
            end += (shares[s].count + COLUMNS - 1) / COLUMNS * COLUMNS;
        }
    }
};

template <class W, class T>
void multiply_lanes(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out) {
    const Matrix& like = shares->w;
    int64_t size = like.size, out_size = like.out_size, block_bytes = like.row_bytes * LANES;
    int64_t num_groups = (size + GROUP - 1) / GROUP, num_blocks = (out_size + LANES - 1) / LANES;
    int64_t piece = PIECE_BYTES / (block_bytes + 1) / BLOCKS * BLOCKS;  // no bytes: more ranks than columns to cut
    piece = piece < BLOCKS ? BLOCKS : piece;
    int64_t num_pieces = (num_blocks + piece - 1) / piece;
    int64_t at_once = CACHE_BYTES / (num_groups * int64_t(sizeof(Rounded::Group)) + 1) * COLUMNS;
    at_once = at_once < COLUMNS ? COLUMNS : at_once > MOST_ROWS ? MOST_ROWS : at_once;
    // A share's rows of x, of which `begin` is the first in `own`, with B blocks of its weights.
    auto run = [&](auto blocks, const Rounded& own, int64_t begin, const Share& share, int64_t block)
                   __attribute__((always_inline)) {
        constexpr int B = decltype(blocks)::value;
        W w(share.w, block);
        const T* bias = (const T*)share.w.bias;
        T* to = out + share.first * out_size;
        int64_t count = share.count, row = block * LANES;
        int64_t part = count > COLUMNS ? PART : num_groups;  // few rows: no weight is read twice
        f32x16 sums[(MOST_ROWS + COLUMNS) * BLOCKS];
        std::memset(sums, 0, count * B * sizeof(f32x16));
        for (int64_t g = 0; g < num_groups; g += part) {
            int64_t end = num_groups - g < part ? num_groups : g + part;
            for (int64_t c = 0; c < count; c += COLUMNS)
                tile_of<W, B>(count - c, w, own.of(begin + c), g, end, sums + c * B);
        }
        for (int64_t c = 0; c < count; ++c) {
            int64_t first = c / COLUMNS * COLUMNS, width = count - first < COLUMNS ? count - first : COLUMNS;
            f32x16 v[B];
            for (int b = 0; b < B; ++b) v[b] = sums[first * B + b * width + c - first];
            own.each_spike(begin + c, [&](const Rounded::Spike& spike) __attribute__((always_inline)) {
#pragma GCC unroll 2
                for (int b = 0; b < B; ++b) v[b] += w.spike(b, spike);
            });
            for (int b = 0; b < B; ++b) {
                int64_t at = row + b * LANES, rows = out_size - at;
                f32x16 all = w.finish(b, v[b]);
                if (bias) all += load_up_to_16(bias + at, rows);
                save_up_to_16(to + c * out_size + at, all, rows);
            }
        }
    };
    in_parts(shares, num_shares, at_once, [&](const Share* shares, int64_t num_shares) {
        Begins begins(shares, num_shares);
        auto take = [&](Rounded& to, int64_t s, int64_t c) {
            to.take(begins.of[s] + c, x + (shares[s].first + c) * x_stride, size);
        };
        auto own = made_ready<Rounded>(team, shares, num_shares, take, begins.end, num_groups);
#pragma omp for schedule(guided) nowait
        for (int64_t p = 0; p < num_shares * num_pieces; ++p) {
            int64_t s = p / num_pieces, b = p % num_pieces * piece, end = std::min(b + piece, num_blocks);
            if (BLOCKS > 1 && shares[s].count > 2)  // fewer rows wait for weights: better in one stream
                for (; b + BLOCKS <= end; b += BLOCKS)
                    run(std::integral_constant<int, BLOCKS>{}, *own, begins.of[s], shares[s], b);
            for (; b < end; ++b) run(std::integral_constant<int, 1>{}, *own, begins.of[s], shares[s], b);
        }
    });
    team.meet();
}

}  // namespace
