// One row of what stands between matrix products: norm, sum, rotation, the gate. One pass over the data each, float32 inside.
#pragma once

#include <cmath>

#include "vectors.h"

template <class T>
inline void norm_row(const T* from, const T* weight, float eps, T* to, int64_t size) {  // `to` may be `from`
    f32x16 squares{};
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = load_up_to_16(from + i, size - i);
        squares += v * v;
    }
    float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = rounded<T>(load_up_to_16(from + i, size - i) * scale);
        save_up_to_16(to + i, load_up_to_16(weight + i, size - i) * v, size - i);
    }
}

template <class T>
inline void add_row(T* to, const T* from, int64_t size) {
    for (int64_t i = 0; i < size; i += 16)
        save_up_to_16(to + i, load_up_to_16(to + i, size - i) + load_up_to_16(from + i, size - i), size - i);
}

template <class T>
inline void rotate_row(const T* from, const T* cos, const T* sin, T* to, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += 16) {
        int64_t rest = half - i;
        f32x16 a = load_up_to_16(from + i, rest), b = load_up_to_16(from + half + i, rest);
        f32x16 c = load_up_to_16(cos + i, rest), s = load_up_to_16(sin + i, rest);
        save_up_to_16(to + i, fused(a, c, -(b * s)), rest);
        save_up_to_16(to + half + i, fused(b, c, a * s), rest);
    }
}

template <class T>
inline void gate_row(const T* gate, const T* up, T* to, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = rounded<T>(silu(load_up_to_16(gate + i, size - i)));
        save_up_to_16(to + i, v * load_up_to_16(up + i, size - i), size - i);
    }
}

inline i32x16 lane_numbers() {
    constexpr int32_t NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<i32x16>(NUMBERS);
}

template <class T>
inline f32x16 load_for_greatest(const T* from, int64_t count) {  // up to 16, and behind them what is never greatest
    f32x16 v = load_up_to_16(from, count);
    return count < 16 ? choose(lane_numbers() < int32_t(count), v, fill(-__builtin_inff())) : v;
}

struct Greatest {
    int64_t place;  // the first of equals; where there is NaN, any
    bool all_finite;
};

template <class T>
inline Greatest greatest_of_row(const T* from, int64_t size) {  // at least one
    f32x16 best = fill(-__builtin_inff()), spoilt{};
    i32x16 now = lane_numbers(), places = now;
    for (int64_t i = 0; i < size; i += 16, now = now + 16) {
        f32x16 given = load_up_to_16(from + i, size - i), v = load_for_greatest(from + i, size - i);
        spoilt += given - given;  // 0, or NaN where one is not finite
        places = choose(v > best, now, places);
        best = larger(v, best);
    }
    float most = largest(best);
    int64_t place = size;
    for (int i = 0; i < 16; ++i)
        if (best[i] == most && places[i] < place) place = places[i];
    return {place < size ? place : 0, sum(spoilt) == 0.0f};
}

// Where a token's logits send it: the `count` likeliest of `size`, best first, and their weights, a softmax over all,
// or where it `renormalizes` over those. `room`: size + 16.
template <class T>
inline void route_row(const T* logits, int64_t size, int64_t count, bool renormalizes, float* room, int64_t* ids,
                      float* weights) {
    constexpr float TAKEN = -1.0f;  // no probability is
    f32x16 most = fill(-__builtin_inff()), all{};
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = load_for_greatest(logits + i, size - i);
        save(room + i, v);
        most = larger(most, v);
    }
    float top = largest(most);
    for (int64_t i = 0; i < size; i += 16) {
        f32x16 v = exponential(load<f32x16>(room + i) - top);
        save(room + i, v);
        all += v;
    }
    float total = sum(all), chosen = 0.0f;
    for (int64_t c = 0; c < count; ++c) {
        int64_t best = -1;
        for (int64_t i = 0; i < size; ++i)
            if (room[i] != TAKEN && (best < 0 || room[i] > room[best])) best = i;
        ids[c] = best;
        weights[c] = room[best] / total;
        chosen += weights[c];
        room[best] = TAKEN;
    }
    for (int64_t c = 0; c < count && renormalizes; ++c) weights[c] /= chosen;
}
