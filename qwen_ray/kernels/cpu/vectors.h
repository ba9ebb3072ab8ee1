// Arithmetic with sixteen float32 lanes, whatever the machine: what all kernels here are written in.
//
// Products are fused multiply-adds of float32, also of bfloat16, which is exact. A sum over a row always runs in the same
// order: element i of a step goes to lane i (bfloat16: elements 2i + 1, then 2i), steps follow each other, lanes are added
// as in `add_lanes`. So a result depends on its own row and column alone, never on how many others are computed with it,
// nor on the machine: the processors' own products of pairs of bfloat16 add in that order, too. (They take what is below
// 1e-38 for 0.)
#pragma once

#include "wide.h"

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
    operator float() const { return _cvtsh_ss(bits); }
};

struct alignas(64) Line {  // of a cache: memory that is made of lines is read by whole vectors
    float floats[16];
};

// Of memory that is read from one end to the other: what lies 4 KiB behind `from`.
inline void ask_ahead(const void* from) { __builtin_prefetch((const char*)from + 4096); }

inline f32x16 of_bits(const float* factor) {  // a float, or a pair, in all lanes
    return (f32x16)(i32x16{} + load<int32_t>(factor));
}

inline f32x16 fill(float value) { return f32x16{} + value; }

// --- float32 and bfloat16 ---------------------------------------------------------------------------------------------

inline f32x16 to_float(u16x16 v) { return (f32x16)(widen(v) << 16); }

inline u16x16 to_bf16(f32x16 v) {  // to the nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#endif
    u32x16 bits = (u32x16)v;
    u32x16 even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 nan = (bits >> 16) | 0x40;
    return low_half(choose(v == v, even, nan));
}

// How elements of type T are loaded and stored, and what is multiplied of them: STEP at once, as PARTS vectors of factors.
// A factor holds EACH elements. Where factors follow each other in a sum, `place` is that which holds element i.
template <class T>
struct Row;

template <>
struct Row<float> {
    static constexpr int STEP = 16, PARTS = 1, EACH = 1;
    static constexpr int64_t place(int64_t i) { return i; }
    static f32x16 load16(const float* from) { return load<f32x16>(from); }
    static void save16(float* to, f32x16 v) { save(to, v); }
    static void factors(const float* from, f32x16* to) { to[0] = load<f32x16>(from); }
    static f32x16 multiply_add(f32x16 sum, f32x16 a, f32x16 b) { return sum + a * b; }
};

template <>
struct Row<bf16> {
    static constexpr int STEP = 32;
    static f32x16 load16(const bf16* from) { return to_float(load<u16x16>(from)); }
    static void save16(bf16* to, f32x16 v) { save(to, to_bf16(v)); }
#if defined(__AVX512BF16__)
    static constexpr int PARTS = 1, EACH = 2;  // pairs, as they are
    static constexpr int64_t place(int64_t i) { return i / 2; }
    static void factors(const bf16* from, f32x16* to) { to[0] = load<f32x16>(from); }
    static f32x16 multiply_add(f32x16 sum, f32x16 a, f32x16 b) {
        return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
#else
    static constexpr int PARTS = 2, EACH = 1;  // widened: the elements with odd numbers, those with even ones
    static constexpr int64_t place(int64_t i) { return i ^ 1; }
    static void factors(const bf16* from, f32x16* to) {
        u32x16 both = load<u32x16>(from);
        to[0] = (f32x16)(both & 0xffff0000);
        to[1] = (f32x16)(both << 16);
    }
    static f32x16 multiply_add(f32x16 sum, f32x16 a, f32x16 b) { return sum + a * b; }
#endif
};

template <>
struct Row<fp16> {
    static f32x16 load16(const fp16* from) { return from_half(from); }
};

// Of a row, in floats.
template <class T>
constexpr int64_t factors_size(int64_t size) {
    return (size + Row<T>::STEP - 1) / Row<T>::STEP * Row<T>::PARTS * 16;
}

// The last `count` elements of a row, fewer than STEP, and zeros, as factors.
template <class T>
inline void some_factors(const T* from, int64_t count, f32x16* to) {
    T room[Row<T>::STEP] = {};
    std::memcpy(room, from, count * sizeof(T));
    Row<T>::factors(room, to);
}

// A row as `factors` has it, step after step, zeros behind it.
template <class T>
inline void factor_row(const T* from, int64_t size, float* to) {
    constexpr int STEP = Row<T>::STEP, PARTS = Row<T>::PARTS;
    for (int64_t k = 0; k < size; k += STEP, to += 16 * PARTS) {
        f32x16 v[PARTS];
        if (k + STEP <= size)
            Row<T>::factors(from + k, v);
        else
            some_factors(from + k, size - k, v);
        for (int i = 0; i < PARTS; ++i) save(to + 16 * i, v[i]);
    }
}

template <class T>
inline f32x16 load_up_to_16(const T* from, int64_t count) {
    if (count >= 16) return Row<T>::load16(from);
    if (count <= 0) return f32x16{};
    T room[16] = {};
    std::memcpy(room, from, count * sizeof(T));
    return Row<T>::load16(room);
}

template <class T>
inline void save_up_to_16(T* to, f32x16 v, int64_t count) {
    if (count >= 16) return Row<T>::save16(to, v);
    if (count <= 0) return;
    T room[16];
    Row<T>::save16(room, v);
    std::memcpy(to, room, count * sizeof(T));
}

template <class T>
inline f32x16 rounded(f32x16 v) {  // as if it had been stored as T
    if constexpr (sizeof(T) == 2) return to_float(to_bf16(v));
    return v;
}

// --- sums over lanes --------------------------------------------------------------------------------------------------

// Lane i of the result is the sum over the lanes of v[i]; N up to 16, the lanes behind N are 0 or copies.
template <int N>
inline f32x16 add_lanes(const f32x16* v) {
    constexpr int H = (N + 1) / 2, Q = (H + 1) / 2, E = (Q + 1) / 2;
    f32x16 h[8], q[4], e[2];
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) h[i] = halves(v[2 * i], 2 * i + 1 < N ? v[2 * i + 1] : v[2 * i]);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) q[i] = quarters(h[2 * i], 2 * i + 1 < H ? h[2 * i + 1] : h[2 * i]);
#pragma GCC unroll 2
    for (int i = 0; i < E; ++i) e[i] = eighths(q[2 * i], 2 * i + 1 < Q ? q[2 * i + 1] : q[2 * i]);
    return pairs(e[0], E > 1 ? e[1] : e[0]);
}

[[gnu::always_inline]] inline void transpose(f32x16 (&rows)[16]) {  // 16 of them: lane j of row i to lane i of row j
    f32x16 other[16];
    auto zip = [](const f32x16* from, f32x16* to) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            to[2 * i] = zip_first(from[i], from[i + 8]);
            to[2 * i + 1] = zip_last(from[i], from[i + 8]);
        }
    };
    zip(rows, other);
    zip(other, rows);
    zip(rows, other);
    zip(other, rows);
}

inline float sum(f32x16 v) { return add_lanes<1>(&v)[0]; }

inline f32x16 larger(f32x16 a, f32x16 b) { return choose(a > b, a, b); }

inline float largest(f32x16 v) {
    float best = v[0];
    for (int i = 1; i < 16; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

// --- functions --------------------------------------------------------------------------------------------------------

inline f32x16 exponential_part(f32x16 r) {  // e to the r, of half of ln 2 at most
    f32x16 p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

// e to the x, within 2 units of the last place; 0 below -87.3, infinity above 88.7; NaN stays NaN.
inline f32x16 exponential(f32x16 x) {
    f32x16 inside = choose(x > -87.3f, x, fill(-87.3f));
    inside = choose(inside < 88.7f, inside, fill(88.7f));
    f32x16 magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    f32x16 n = inside * 1.44269504088896341f + magic;
    i32x16 power = (i32x16)n - 0x4b400000;
    n -= magic;
    f32x16 r = inside - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    i32x16 half = power >> 1;  // 2^128 is no float32: in two steps
    f32x16 y = exponential_part(r) * (f32x16)((half + 127) << 23) * (f32x16)((power - half + 127) << 23);
    y = choose(x < -87.3f, fill(0.0f), y);
    y = choose(x > 88.7f, fill(__builtin_inff()), y);
    return choose(x == x, y, x);
}

// The same for x up to 0.
inline f32x16 exponential_of_negative(f32x16 x) {
    f32x16 magic = fill(12582912.0f);
    f32x16 n = x * 1.44269504088896341f + magic;
    i32x16 power = (i32x16)n - 0x4b400000;
    n -= magic;
    f32x16 r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    f32x16 y = exponential_part(r) * (f32x16)((power + 127) << 23);
    return choose(x < -87.3f, fill(0.0f), y);
}

inline f32x16 silu(f32x16 x) { return x / (1.0f + exponential(-x)); }
