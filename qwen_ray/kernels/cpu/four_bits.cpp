// Weights in 4 bits: `lanes.h` with half a byte for each, and for each few of a row a scale and what 0 stands for.
#include "lanes.h"

namespace {

struct FourBits {
    static constexpr int PARTS = 2;  // scales are for 32 columns or more
    static constexpr int OF_PART = GROUP / PARTS;
    const uint8_t* values;       // [blocks][columns / 8][LANES][4]
    const fp16 *scales, *least;  // [blocks][columns / group][LANES]
    int64_t block_bytes, block_scales;
    int group;

    FourBits(const Matrix& w, int64_t block)
        : values((const uint8_t*)w.values + block * w.row_bytes * LANES),
          block_bytes(w.row_bytes * LANES),
          block_scales(w.row_bytes * 2 / w.group * LANES),
          group(w.group) {
        scales = (const fp16*)w.scales + block * block_scales;
        least = (const fp16*)w.least + block * block_scales;
    }

    template <int C>
    void fours(int b, int64_t g, int q, u32x16 (&two)[2]) const {
        const uint8_t* at = values + b * block_bytes + (g * QUADS + q) * 2 * LANES;
        ask_ahead(at);  // three streams at a time are more than processors foresee
        u32x16 packed = load<u32x16>(at);
        two[0] = packed & 0x0f0f0f0fu;
        two[1] = (packed >> 4) & 0x0f0f0f0fu;
    }

    template <int C>
    void add(f32x16* sums, const i32x16* whole, int b, int64_t g, int part, const Rounded::Group& x) const {
        int64_t own = b * block_scales + (g * GROUP + part * OF_PART) / group * LANES;
        f32x16 scale = Row<fp16>::load16(scales + own), start = Row<fp16>::load16(least + own);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            f32x16 v = fused(to_float(whole[c]), scale, start * x.totals[c][part]);
            sums[c] += v * x.scales[c];
        }
    }

    f32x16 spike(int b, const Rounded::Spike& spike) const {
        u32x16 packed = load<u32x16>(values + b * block_bytes + (spike.four & ~1) * 2 * LANES);
        u32x16 four = (packed >> (spike.four & 1) * 4) & 0x0f0f0f0fu;
        i32x16 whole = multiply_add(i32x16{}, four, i32x16{} + spike.bytes);
        f32x16 scale = Row<fp16>::load16(scales + b * block_scales + spike.four * 4 / group * LANES);
        return to_float(whole) * scale * spike.scale;
    }

    f32x16 finish(int, f32x16 sums) const { return sums; }
};

}  // namespace

template <class T>
void multiply_four_bits(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out) {
    multiply_lanes<FourBits>(team, x, x_stride, shares, num_shares, out);
}
template void multiply_four_bits<float>(Team&, const float*, int64_t, const Share*, int64_t, float*);
template void multiply_four_bits<bf16>(Team&, const bf16*, int64_t, const Share*, int64_t, bf16*);
