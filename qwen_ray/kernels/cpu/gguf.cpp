// Blocks of GGUF's quantized types widened to float32, to the last bit as the gguf package does.
//
// A type is the layout of a block, as ggml-common.h of llama.cpp gives it, and `widen`, which gives its SIZE values in
// order. Every product here is exact in float32 (11 bits of a half float, at most 7 of a scale, 6 of a value), so only
// adding a least value rounds, once, in whatever order it is computed.
#include "vectors.h"

namespace {

// --- 32 values --------------------------------------------------------------------------------------------------------

struct Q8_0 {
    static constexpr int SIZE = 32;
    fp16 scale;
    int8_t values[32];

    void widen(float* to) const {
        float d = scale;
        for (int i = 0; i < 32; ++i) to[i] = d * values[i];
    }
};

struct Q4_0 {
    static constexpr int SIZE = 32;
    fp16 scale;
    uint8_t halves[16];

    void widen(float* to) const {
        float d = scale;
        for (int i = 0; i < 16; ++i) to[i] = d * ((halves[i] & 15) - 8);
        for (int i = 0; i < 16; ++i) to[16 + i] = d * ((halves[i] >> 4) - 8);
    }
};

struct Q4_1 {
    static constexpr int SIZE = 32;
    fp16 scale, least;
    uint8_t halves[16];

    void widen(float* to) const {
        float d = scale, m = least;
        for (int i = 0; i < 16; ++i) to[i] = d * (halves[i] & 15) + m;
        for (int i = 0; i < 16; ++i) to[16 + i] = d * (halves[i] >> 4) + m;
    }
};

// The fifth bits of 32 values, as a number of 0 or 16.
inline int fifth(uint32_t bits, int i) { return (bits >> i & 1) << 4; }

struct Q5_0 {
    static constexpr int SIZE = 32;
    fp16 scale;
    uint8_t high[4], halves[16];

    void widen(float* to) const {
        float d = scale;
        uint32_t bits;
        std::memcpy(&bits, high, 4);
        for (int i = 0; i < 16; ++i) to[i] = d * (((halves[i] & 15) | fifth(bits, i)) - 16);
        for (int i = 0; i < 16; ++i) to[16 + i] = d * (((halves[i] >> 4) | fifth(bits, 16 + i)) - 16);
    }
};

struct Q5_1 {
    static constexpr int SIZE = 32;
    fp16 scale, least;
    uint8_t high[4], halves[16];

    void widen(float* to) const {
        float d = scale, m = least;
        uint32_t bits;
        std::memcpy(&bits, high, 4);
        for (int i = 0; i < 16; ++i) to[i] = d * ((halves[i] & 15) | fifth(bits, i)) + m;
        for (int i = 0; i < 16; ++i) to[16 + i] = d * ((halves[i] >> 4) | fifth(bits, 16 + i)) + m;
    }
};

// --- 256 values, whose parts have scales of their own -----------------------------------------------------------------

struct Q2_K {
    static constexpr int SIZE = 256;
    uint8_t scales[16], quarters[64];  // low half: a part's scale, high half: its least value
    fp16 scale, least;

    void widen(float* to) const {
        float d = scale, m = least;
        for (int part = 0; part < 16; ++part) {  // of 16 values: two for each of 4 shifts, in each half of the block
            const uint8_t* from = quarters + part / 8 * 32 + part % 2 * 16;
            float part_scale = d * (scales[part] & 15), part_least = m * (scales[part] >> 4);
            int shift = part % 8 / 2 * 2;
            for (int i = 0; i < 16; ++i) *to++ = part_scale * (from[i] >> shift & 3) - part_least;
        }
    }
};

struct Q3_K {
    static constexpr int SIZE = 256;
    uint8_t high[32], quarters[64], scales[12];
    fp16 scale;

    // 6 bits and an offset of 32: four in the halves of the first 8 bytes, two in the last 4.
    int part_scale(int part) const {
        int low = part < 8 ? scales[part] & 15 : scales[part - 8] >> 4;
        return (low | (scales[8 + part % 4] >> (part / 4 * 2) & 3) << 4) - 32;
    }

    void widen(float* to) const {
        float d = scale;
        for (int part = 0; part < 16; ++part) {
            const uint8_t *from = quarters + part / 8 * 32 + part % 2 * 16, *third = high + part % 2 * 16;
            float own = d * part_scale(part);
            int shift = part % 8 / 2 * 2, bit = part / 2;
            for (int i = 0; i < 16; ++i) *to++ = own * ((from[i] >> shift & 3) - (third[i] >> bit & 1 ? 0 : 4));
        }
    }
};

// Scales and least values of eight parts, 6 bits each, in Q4_K and Q5_K.
struct PartScales {
    uint8_t bytes[12];

    int scale(int part) const {
        return part < 4 ? bytes[part] & 63 : (bytes[part + 4] & 15) | bytes[part - 4] >> 6 << 4;
    }
    int least(int part) const {
        return part < 4 ? bytes[part + 4] & 63 : bytes[part + 4] >> 4 | bytes[part] >> 6 << 4;
    }
};

struct Q4_K {
    static constexpr int SIZE = 256;
    fp16 scale, least;
    PartScales parts;
    uint8_t halves[128];

    void widen(float* to) const {
        for (int part = 0; part < 8; ++part) {  // two parts share 32 bytes
            const uint8_t* from = halves + part / 2 * 32;
            float d = scale * parts.scale(part), m = least * parts.least(part);
            int shift = part % 2 * 4;
            for (int i = 0; i < 32; ++i) *to++ = d * (from[i] >> shift & 15) - m;
        }
    }
};

struct Q5_K {
    static constexpr int SIZE = 256;
    fp16 scale, least;
    PartScales parts;
    uint8_t high[32], halves[128];

    void widen(float* to) const {
        for (int part = 0; part < 8; ++part) {
            const uint8_t* from = halves + part / 2 * 32;
            float d = scale * parts.scale(part), m = least * parts.least(part);
            int shift = part % 2 * 4;
            for (int i = 0; i < 32; ++i) *to++ = d * ((from[i] >> shift & 15) | (high[i] >> part & 1) << 4) - m;
        }
    }
};

struct Q6_K {
    static constexpr int SIZE = 256;
    uint8_t halves[128], quarters[64];
    int8_t scales[16];
    fp16 scale;

    void widen(float* to) const {
        float d = scale;
        for (int part = 0; part < 16; ++part) {  // of 16 values, 8 parts to each half of the block
            int quarter = part % 8 / 2;          // of that half
            const uint8_t* low = halves + part / 8 * 64 + quarter % 2 * 32 + part % 2 * 16;
            const uint8_t* top = quarters + part / 8 * 32 + part % 2 * 16;
            float own = d * scales[part];
            int low_shift = quarter / 2 * 4, top_shift = quarter * 2;
            for (int i = 0; i < 16; ++i)
                *to++ = own * (((low[i] >> low_shift & 15) | (top[i] >> top_shift & 3) << 4) - 32);
        }
    }
};

template <class Block>
void widen_all(const void* blocks, int64_t num_blocks, float* to) {
    static_assert(alignof(Block) <= 2, "as it lies in a file");
    for (int64_t b = 0; b < num_blocks; ++b) ((const Block*)blocks)[b].widen(to + b * Block::SIZE);
}

}  // namespace

// Blocks lie as they do in a file, from any even address on.
#define EXPORT(NAME, TYPE, BYTES)                                                                                      \
    static_assert(sizeof(TYPE) == BYTES, "as it lies in a file");                                                      \
    extern "C" void widen_##NAME(const void* blocks, int64_t num_blocks, float* to) {                                  \
        widen_all<TYPE>(blocks, num_blocks, to);                                                                       \
    }
EXPORT(q8_0, Q8_0, 34)
EXPORT(q4_0, Q4_0, 18)
EXPORT(q4_1, Q4_1, 20)
EXPORT(q5_0, Q5_0, 22)
EXPORT(q5_1, Q5_1, 24)
EXPORT(q2_k, Q2_K, 84)
EXPORT(q3_k, Q3_K, 110)
EXPORT(q4_k, Q4_K, 144)
EXPORT(q5_k, Q5_K, 176)
EXPORT(q6_k, Q6_K, 210)
