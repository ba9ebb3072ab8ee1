// Activations rounded to whole numbers, and their products with weights that are whole numbers already.
#pragma once

#include "vectors.h"

// Lane i: sum[i] and the products of its four bytes of w, without a sign, with those of x, which have one.
inline i32x16 multiply_add(i32x16 sum, u32x16 w, i32x16 x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    __m512i a = (__m512i)w, b = (__m512i)x;
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)),
                                     _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    return sum + (i32x16)even + (i32x16)_mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
#else
    auto half = [](i32x16::Half sum, u32x16::Half w, i32x16::Half x) __attribute__((always_inline)) {
        __m256i a = (__m256i)w, b = (__m256i)x;
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
        return sum + (i32x16::Half)even + (i32x16::Half)odd;
    };
    return {half(sum.low, w.low, x.low), half(sum.high, w.high, x.high)};
#endif
}

inline i32x16 nearest(f32x16 v) { return (i32x16)(v + 12582912.0f) - 0x4b400000; }
