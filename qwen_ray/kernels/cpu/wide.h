// Sixteen lanes of float32 or of 32-bit integers: one AVX-512 register, or two of AVX2.
//
// With AVX-512 they are vectors of the compiler's own. Without, those would be kept in memory, several times slower, so
// there they are two vectors of eight with the same operators. What either cannot say in operators is a function here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

template <class V>
inline V load_as_it_is(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

using i8x16 = int8_t __attribute__((vector_size(16)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

#if defined(__clang__)
#define SHUFFLE(n, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(n, a, b, ...) __builtin_shuffle(a, b, Integers<n>{__VA_ARGS__})
#endif
template <int N>
struct IntegersOf {
    typedef int32_t type __attribute__((vector_size(4 * N)));
};
template <int N>
using Integers = typename IntegersOf<N>::type;

#if defined(__AVX512F__)

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));

template <class V>
inline V load(const void* from) {
    return load_as_it_is<V>(from);
}

template <class V>
inline void save(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// For each lane one of a, where it holds, or of b.
template <class V>
inline V choose(i32x16 holds, V a, V b) {
    return holds ? a : b;
}

// a * b + c, rounded once. Compilers see to that themselves; which product of a sum of two they take is theirs, too.
inline f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
inline u32x16 widen(u16x16 v) { return (u32x16)_mm512_cvtepu16_epi32((__m256i)v); }  // compilers do it by halves
inline u16x16 low_half(u32x16 v) { return (u16x16)_mm512_cvtepi32_epi16((__m512i)v); }
inline i8x16 low_byte(i32x16 v) { return (i8x16)_mm512_cvtepi32_epi8((__m512i)v); }
inline f32x16 from_half(const void* from) { return (f32x16)_mm512_cvtph_ps(load<__m256i>(from)); }

// --- lanes to other lanes ---------------------------------------------------------------------------------------------

inline f32x16 halves(f32x16 a, f32x16 b) {  // lane i + lane i + 8, of a and of b
    return SHUFFLE(16, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(16, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline f32x16 quarters(f32x16 a, f32x16 b) {  // of each 8 lanes: i + (i + 4)
    return SHUFFLE(16, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(16, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
inline f32x16 eighths(f32x16 a, f32x16 b) {  // of each 4 lanes: i + (i + 2)
    return SHUFFLE(16, a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           SHUFFLE(16, a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
inline f32x16 pairs(f32x16 a, f32x16 b) {  // of each 2 lanes: their sum
    return SHUFFLE(16, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(16, a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
inline f32x16 zip_first(f32x16 a, f32x16 b) {  // lanes 0 to 7, of a and b in turn
    return SHUFFLE(16, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline f32x16 zip_last(f32x16 a, f32x16 b) {  // lanes 8 to 15
    return SHUFFLE(16, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline f32x16 swap_neighbours(f32x16 v) {
    return SHUFFLE(16, v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

#else

template <class E>
struct alignas(64) Wide {
    typedef E Half __attribute__((vector_size(32)));
    Half low, high;

    E operator[](int i) const { return i < 8 ? low[i] : high[i - 8]; }

    template <class Other>
    explicit operator Wide<Other>() const {  // the same bits
        using To = typename Wide<Other>::Half;
        return {(To)low, (To)high};
    }

    Wide operator-() const { return {-low, -high}; }

#define BINARY(OP)                                                                                                     \
    friend Wide operator OP(Wide a, Wide b) { return {a.low OP b.low, a.high OP b.high}; }                             \
    friend Wide operator OP(Wide a, E b) { return {a.low OP b, a.high OP b}; }                                         \
    friend Wide operator OP(E a, Wide b) { return {a OP b.low, a OP b.high}; }                                         \
    Wide& operator OP##=(Wide other) { return *this = *this OP other; }
    BINARY(+) BINARY(-) BINARY(*) BINARY(/) BINARY(&) BINARY(|)
#undef BINARY

    friend Wide operator<<(Wide a, int bits) { return {a.low << bits, a.high << bits}; }
    friend Wide operator>>(Wide a, int bits) { return {a.low >> bits, a.high >> bits}; }

#define COMPARISON(OP)                                                                                                 \
    friend Wide<int32_t> operator OP(Wide a, Wide b) { return {a.low OP b.low, a.high OP b.high}; }                    \
    friend Wide<int32_t> operator OP(Wide a, E b) { return {a.low OP b, a.high OP b}; }
    COMPARISON(<) COMPARISON(>) COMPARISON(==)
#undef COMPARISON
};

using f32x16 = Wide<float>;
using i32x16 = Wide<int32_t>;
using u32x16 = Wide<uint32_t>;
using f32x8 = f32x16::Half;

template <class V>
struct Load {
    static V from(const void* at) { return load_as_it_is<V>(at); }
    static void to(void* at, V v) { std::memcpy(at, &v, sizeof v); }
};
template <class E>
struct Load<Wide<E>> {
    using Half = typename Wide<E>::Half;
    static Wide<E> from(const void* at) {
        return {load_as_it_is<Half>(at), load_as_it_is<Half>((const char*)at + sizeof(Half))};
    }
    static void to(void* at, Wide<E> v) {
        std::memcpy(at, &v.low, sizeof(Half));
        std::memcpy((char*)at + sizeof(Half), &v.high, sizeof(Half));
    }
};

template <class V>
inline V load(const void* from) {
    return Load<V>::from(from);
}

template <class V>
inline void save(void* to, V v) {
    Load<V>::to(to, v);
}

template <class V>
inline V choose(i32x16 holds, V a, V b) {
    return {holds.low ? a.low : b.low, holds.high ? a.high : b.high};
}

inline f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
    auto half = [](f32x8 a, f32x8 b, f32x8 c) { return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); };
    return {half(a.low, b.low, c.low), half(a.high, b.high, c.high)};
}

inline f32x16 to_float(i32x16 v) {
    return {__builtin_convertvector(v.low, f32x8), __builtin_convertvector(v.high, f32x8)};
}
inline u32x16 widen(u16x16 v) {
    __m256i all = (__m256i)v;
    using Half = u32x16::Half;
    return {(Half)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(all)),
            (Half)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(all, 1))};
}
inline u16x16 low_half(u32x16 v) {
    v = v & 0xffff;
    return (u16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v.low, (__m256i)v.high), 0xd8);
}
inline i8x16 low_byte(i32x16 v) {
    __m256i halves = (__m256i)low_half((u32x16)(v & 255));
    return (i8x16)_mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
inline f32x16 from_half(const void* from) {
    return {(f32x8)_mm256_cvtph_ps(load<__m128i>(from)), (f32x8)_mm256_cvtph_ps(load<__m128i>((const char*)from + 16))};
}

inline f32x16 halves(f32x16 a, f32x16 b) { return {a.low + a.high, b.low + b.high}; }
inline f32x8 quarters(f32x8 a, f32x8 b) {
    return SHUFFLE(8, a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(8, a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
inline f32x16 quarters(f32x16 a, f32x16 b) { return {quarters(a.low, a.high), quarters(b.low, b.high)}; }
inline f32x8 eighths(f32x8 a, f32x8 b) {
    return SHUFFLE(8, a, b, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(8, a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}
inline f32x16 eighths(f32x16 a, f32x16 b) { return {eighths(a.low, a.high), eighths(b.low, b.high)}; }
inline f32x8 pairs(f32x8 a, f32x8 b) {
    return SHUFFLE(8, a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(8, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
inline f32x16 pairs(f32x16 a, f32x16 b) { return {pairs(a.low, a.high), pairs(b.low, b.high)}; }
inline f32x16 zip(f32x8 a, f32x8 b) {
    return {SHUFFLE(8, a, b, 0, 8, 1, 9, 2, 10, 3, 11), SHUFFLE(8, a, b, 4, 12, 5, 13, 6, 14, 7, 15)};
}
inline f32x16 zip_first(f32x16 a, f32x16 b) { return zip(a.low, b.low); }
inline f32x16 zip_last(f32x16 a, f32x16 b) { return zip(a.high, b.high); }
inline f32x16 swap_neighbours(f32x16 v) {
    return {SHUFFLE(8, v.low, v.low, 1, 0, 3, 2, 5, 4, 7, 6), SHUFFLE(8, v.high, v.high, 1, 0, 3, 2, 5, 4, 7, 6)};
}

#endif
