// Weights in 4 bits: `lanes.h` with half a byte for each, and for each few of a row a scale and what 0 stands for.
#include "lanes.h"

namespace {

struct FourBits {
    static constexpr int PARTS = 2;  // scales are for 32 columns or more
    static constexpr int PART = GROUP / PARTS;
    const uint8_t* values;       // [columns / 8][LANES][4]
    const fp16 *scales, *least;  // [columns / group][LANES]
    int group;

    FourBits(const Matrix& w, int64_t block) : values((const uint8_t*)w.values + block * w.row_bytes * LANES), group(w.group) {
        int64_t first = block * (w.row_bytes * 2 / group * LANES);
        scales = (const fp16*)w.scales + first;
        least = (const fp16*)w.least + first;
    }

    template <int C>
    void fours(int64_t g, int q, u32x16 (&two)[2]) const {
        const uint8_t* at = values + (g * QUADS + q) * 2 * LANES;
        ask_ahead(at);  // three streams at a time are more than processors foresee
        u32x16 packed = load<u32x16>(at);
        two[0] = packed & 0x0f0f0f0fu;
        two[1] = (packed >> 4) & 0x0f0f0f0fu;
    }

    u32x16 four(int64_t g, int q) const {
        u32x16 two[2];
        fours<1>(g, q & ~1, two);
        return two[q & 1];
    }

    template <int C>
    void add(f32x16* sums, const i32x16* whole, int64_t g, int part, const Rounded::Facts* facts) const {
        int64_t own = (g * GROUP + part * PART) / group * LANES;
        f32x16 scale = Row<fp16>::load16(scales + own), start = Row<fp16>::load16(least + own);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            sums[c] += __builtin_convertvector(whole[c], f32x16) * scale + start * facts[c].totals[part];
    }

    f32x16 finish(f32x16 sums) const { return sums; }
};

}  // namespace

template <class T>
void multiply_four_bits(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    multiply_lanes<FourBits>(team, x, x_stride, w, out, num_rows);
}
template void multiply_four_bits<float>(Team&, const float*, int64_t, const Matrix&, float*, int64_t);
template void multiply_four_bits<bf16>(Team&, const bf16*, int64_t, const Matrix&, bf16*, int64_t);
