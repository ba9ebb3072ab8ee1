// out = x w^T + bias with weights that are whole numbers of few bits; see `quantized.py` for how they are packed.
//
// Sixteen rows of weights lie side by side, four columns of each in turn: a lane of a register is a row, so scales need
// no spreading and sums no adding up of lanes, and four activations at a time meet all lanes. Activations are rounded to
// whole numbers first (`Rounded`). Products of a part of a group are integers, exact; then they meet the scales. Rows of
// x are independent of each other: one is computed alike whatever is computed beside it.
#pragma once

#include <memory>

#include "rounding.h"
#include "team.h"

namespace {

constexpr int LANES = 16, GROUP = 64;       // rows of a block; columns that share an activation's scale
constexpr int QUADS = GROUP / 4;            // four columns each
constexpr int64_t PIECE_BYTES = 64 << 10;   // of weights that a thread takes at a time
constexpr int64_t MOST_ROWS = 256;          // of x that are rounded at once
#if defined(__AVX512F__)
constexpr int COLUMNS = 8;  // rows of x at once: of 32 registers 24 hold sums
#else
constexpr int COLUMNS = 2;
#endif

// Rows of x as whole numbers. A group's scale lets a byte reach as far as its largest activation, or 5 times their mean
// size if that is less: what is larger has a second byte, 256 times as much, and is multiplied a second time. So one that
// stands out does not cost the others their precision. COLUMNS rows lie beside each other, group by group.
class Rounded {
  public:
    struct Facts {
        float scale;
        int32_t total;      // of the group, whole
        float totals[2];    // of its halves
        uint32_t large;     // bit q: some of four q have a second byte
    };
    struct alignas(64) Group {
        int8_t low[COLUMNS][GROUP], high[COLUMNS][GROUP];  // high: where `large` says so
        Facts facts[COLUMNS];
    };

    Rounded(int64_t num_rows, int64_t num_groups)
        : num_groups(num_groups), groups(new Group[(num_rows + COLUMNS - 1) / COLUMNS * num_groups]) {}

    // Those of rows `row` to row + COLUMNS - 1, of which `row` is the first of its groups.
    const Group* of(int64_t row) const { return groups.get() + row / COLUMNS * num_groups; }

    template <class T>
    void take(int64_t row, const T* from, int64_t size) {
        for (int64_t g = 0; g < num_groups; ++g)
            take_group(groups[row / COLUMNS * num_groups + g], row % COLUMNS, from + g * GROUP, size - g * GROUP);
    }

    const int64_t num_groups;

  private:
    static constexpr float USUAL = 5.0f;

    template <class T>
    static void take_group(Group& group, int64_t c, const T* from, int64_t size) {
        f32x16 v[4], most{}, sizes{}, spoilt{};
        for (int i = 0; i < 4; ++i) {
            v[i] = load_up_to_16(from + 16 * i, size - 16 * i);
            f32x16 positive = larger(v[i], -v[i]);
            most = larger(most, positive);
            sizes += positive;
            spoilt += v[i] - v[i];  // 0, or NaN where one is not finite
        }
        float reach = largest(most), usual = sum(sizes) * (USUAL / GROUP);
        bool any_large = reach > usual;
        float scale = (any_large ? usual : reach) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        Facts& facts = group.facts[c];
        facts = {scale + sum(spoilt), 0, {}, 0};
        for (int half = 0; half < 2; ++half) {
            i32x16 total{};
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                i32x16 whole = nearest(v[i] * inverse);
                total += whole;
                if (any_large) {
                    i32x16 low = (whole << 24) >> 24, high = (whole - low) >> 8;
                    save(group.high[c] + 16 * i, __builtin_convertvector(high, i8x16));
                    for (int j = 0; j < 16; ++j) facts.large |= uint32_t(high[j] != 0) << (4 * i + j / 4);
                }
                save(group.low[c] + 16 * i, __builtin_convertvector(whole, i8x16));
            }
            facts.totals[half] = sum(__builtin_convertvector(total, f32x16));
        }
        facts.total = int32_t(facts.totals[0] + facts.totals[1]);
    }

    std::unique_ptr<Group[]> groups;  // [rows / COLUMNS, num_groups]
};

// C rows of x times a block of weights: sums[c], a lane to each row of weights. W is such a block:
//   PARTS                            of a group, whose products are integers until they meet the scales
//   fours<C>(g, q, u32x16 (&two)[2]) columns 4 q to 4 q + 7 of group g, without a sign
//   four(g, q)                       columns 4 q to 4 q + 3
//   add(sums, whole, g, part, facts) `whole`: the sums over a part's columns
//   finish(sums)
template <class W, int C>
[[gnu::noinline]] void tile(const W& w, const Rounded::Group* x, int64_t num_groups, f32x16* to) {
    constexpr int PART = QUADS / W::PARTS;
    f32x16 sums[C] = {};
    for (int64_t g = 0; g < num_groups; ++g) {
        const Rounded::Group& group = x[g];
        f32x16 of_group[C] = {};
#pragma GCC unroll 2
        for (int part = 0; part < W::PARTS; ++part) {
            i32x16 whole[C] = {};
            uint32_t large = 0;
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) large |= group.facts[c].large;
#pragma GCC unroll 8
            for (int q = part * PART; q < (part + 1) * PART; q += 2) {
                u32x16 two[2];
                w.template fours<C>(g, q, two);
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) {
                    whole[c] = multiply_add(whole[c], two[0], i32x16{} + load<int32_t>(group.low[c] + 4 * q));
                    whole[c] = multiply_add(whole[c], two[1], i32x16{} + load<int32_t>(group.low[c] + 4 * q + 4));
                }
            }
            if (__builtin_expect(large, 0)) {
                constexpr uint32_t OWN = (uint64_t(1) << PART) - 1;
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) {
                    i32x16 more{};
                    for (uint32_t left = group.facts[c].large & OWN << part * PART; left; left &= left - 1) {
                        int q = __builtin_ctz(left);
                        more = multiply_add(more, w.four(g, q), i32x16{} + load<int32_t>(group.high[c] + 4 * q));
                    }
                    whole[c] += more << 8;
                }
            }
            w.template add<C>(of_group, whole, g, part, group.facts);
        }
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[c] += of_group[c] * group.facts[c].scale;
    }
    for (int c = 0; c < C; ++c) to[c] = w.finish(sums[c]);
}

template <class W, int C = COLUMNS>
inline void tile_of(int count, const W& w, const Rounded::Group* x, int64_t num_groups, f32x16* to) {
    if constexpr (C > 1)
        if (count < C) return tile_of<W, C - 1>(count, w, x, num_groups, to);
    tile<W, C>(w, x, num_groups, to);
}

template <class W, class T>
void multiply_lanes(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    int64_t size = w.size, out_size = w.out_size, block_bytes = w.row_bytes * LANES;
    int64_t num_groups = (size + GROUP - 1) / GROUP, num_blocks = (out_size + LANES - 1) / LANES;
    int64_t piece = PIECE_BYTES / (block_bytes + 1);  // no bytes: more ranks than columns to cut
    piece = piece < 1 ? 1 : piece;
    int64_t num_pieces = (num_blocks + piece - 1) / piece;
    const T* bias = (const T*)w.bias;
    for (int64_t begin = 0; begin < num_rows; begin += MOST_ROWS) {
        int64_t count = num_rows - begin < MOST_ROWS ? num_rows - begin : MOST_ROWS;
        auto take = [&](Rounded& to, int64_t c) { to.take(c, x + (begin + c) * x_stride, size); };
        auto own = made_ready<Rounded>(team, count, take, num_groups);
#pragma omp for schedule(dynamic) nowait
        for (int64_t p = 0; p < num_pieces; ++p) {
            int64_t end = (p + 1) * piece < num_blocks ? (p + 1) * piece : num_blocks;
            for (int64_t b = p * piece; b < end; ++b) {
                W block(w, b);
                int64_t row = b * LANES, rows = out_size - row;
                f32x16 add = bias ? load_up_to_16(bias + row, rows) : f32x16{};
                for (int64_t c = 0; c < count; c += COLUMNS) {
                    f32x16 v[COLUMNS];
                    int width = count - c < COLUMNS ? count - c : COLUMNS;
                    tile_of(width, block, own->of(c), num_groups, v);
                    for (int j = 0; j < width; ++j)
                        save_up_to_16(out + (begin + c + j) * out_size + row, bias ? v[j] + add : v[j], rows);
                }
            }
        }
    }
    team.meet();
}

}  // namespace
