// Paged attention of each sequence's new tokens over all its cached ones: keys and values are read where they lie.
//
// A piece of work is one KV head of some new tokens of one sequence, which go through the cached ones in parts of PART
// tokens; where only one token is new, its parts are pieces of their own. What a part gives is added to what the parts
// before it gave, always in their order. So a new token's bits depend on its own sequence up to it alone: not on its
// neighbours, nor on whether it came by itself or in a chunk of a prompt. Nothing but a sequence's own tokens is read.
#pragma once

#include <vector>

#include "pointwise.h"
#include "team.h"
#include "tile.h"

// Of a step; as `parts.py` lays it out.
struct Sequences {
    const int64_t *starts, *counts, *lengths, *tables;  // of each: first row of q, rows, cached tokens, blocks
    int64_t table_width, num_sequences, block_size;
};

namespace {

constexpr int64_t PART = 512;           // tokens
constexpr int64_t QUERIES = 128;        // rows of q, of one token one for each head of the group, that a piece has
constexpr int64_t MANY = 1 << 18;       // elements of scored keys, over all heads, that are worth several threads
constexpr int64_t BLOCK = 64;           // tokens that are multiplied while their keys are in the nearest cache
constexpr int64_t EXTRA = 16;           // floats beside the weighted values of a query: largest score, sum of weights
#if defined(__AVX512F__)
constexpr int HEADS = 6, VECTORS = 4;  // of sums of values that are kept in registers
#else
constexpr int HEADS = 2, VECTORS = 2;
#endif

struct Piece {
    int64_t sequence, kv_head, first, count;  // of the sequence's new tokens
    int64_t from, to;                         // of its cached ones, as far as the last of those new ones sees
    float* partial;                           // of each query; null: the piece has all parts
};

struct Work {
    std::vector<Piece> pieces;
    std::vector<int64_t> rooms;  // of each sequence's partial results, in floats
    std::vector<float> partials;
    int64_t size = 0;  // elements of scored keys
};

// What a thread works in.
struct Room {
    float* queries;  // [queries, num_factors]
    float* scores;   // [queries, PART]; then weights, as factors
    float* block;    // [num_factors, BLOCK] of keys, [BLOCK, width] of values
    float *results, *part;  // [queries, EXTRA + width]
};

inline float exponential_of(float x) { return exponential(fill(x))[0]; }

// What one more part gave, to what those before it gave: largest score, sum of weights, weighted values.
[[gnu::noinline]] void add_part(float* sum, const float* part, int64_t size) {
    float most = sum[0] > part[0] ? sum[0] : part[0];
    float before = exponential_of(sum[0] - most), now = exponential_of(part[0] - most);
    sum[0] = most;
    sum[1] = __builtin_fmaf(sum[1], before, part[1] * now);
    for (int64_t d = EXTRA; d < EXTRA + size; ++d) sum[d] = __builtin_fmaf(sum[d], before, part[d] * now);
}

// 16 factors of elements that follow each other, as they follow; zeros for what is behind `count` elements.
template <class T>
inline f32x16 load_factors(const T* from, int64_t count) {
    if constexpr (Row<T>::EACH == 1) {
        return load_up_to_16(from, count);
    } else {
        f32x16 v{};
        if (count >= Row<T>::STEP)
            Row<T>::factors(from, &v);
        else if (count > 0)
            some_factors(from, count, &v);
        return v;
    }
}

// The same 16 in their places.
template <class T>
inline f32x16 in_place(f32x16 v) {
    if constexpr (Row<T>::place(0)) return swap_neighbours(v);
    return v;
}

// sums[h][d] += weights[h][p] * values[p][d], factor after factor, for H queries and VECTORS vectors of d.
template <class T, int H>
[[gnu::noinline]] void add_values(const float* values, int64_t stride, const float* weights, int64_t count, float* sums,
                                  int64_t sums_stride) {
    f32x16 s[H][VECTORS];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) s[h][i] = load<f32x16>(sums + h * sums_stride + 16 * i);
    for (int64_t p = 0; p < count; ++p) {
        f32x16 v[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) v[i] = load<f32x16>(values + p * stride + 16 * i);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            f32x16 weight = of_bits(weights + h * PART + p);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; ++i) s[h][i] = Row<T>::multiply_add(s[h][i], weight, v[i]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) save(sums + h * sums_stride + 16 * i, s[h][i]);
}

// turned[p * BLOCK + t]: factor p of keys[t]; behind the last of `count` keys 0.
template <class T>
void turn(const T* const* keys, int64_t count, int64_t dim, float* turned) {
    constexpr int EACH = Row<T>::EACH;
    for (int64_t t = 0; t < BLOCK; t += 16)
        for (int64_t d = 0; d < dim; d += 16 * EACH) {
            f32x16 rows[16];
            bool is_whole = t + 16 <= count && d + Row<T>::STEP <= dim;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                if (is_whole)
                    rows[i] = load_factors(keys[t + i] + d, Row<T>::STEP);
                else
                    rows[i] = t + i < count ? load_factors(keys[t + i] + d, dim - d) : f32x16{};
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) save(turned + Row<T>::place(d + i * EACH) * BLOCK + t, rows[i]);
        }
}

// scores[h][t] = scale * sum over p of queries[h][p] * turned[p][t], factor after factor, for H queries and VECTORS
// vectors of tokens.
template <class T, int H>
[[gnu::noinline]] void multiply(const float* queries, const float* turned, int64_t num_factors, float scale,
                                float* scores) {
    f32x16 s[H][VECTORS] = {};
    for (int64_t p = 0; p < num_factors; ++p) {
        f32x16 k[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) k[i] = load<f32x16>(turned + p * BLOCK + 16 * i);
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            f32x16 q = of_bits(queries + h * num_factors + p);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; ++i) s[h][i] = Row<T>::multiply_add(s[h][i], q, k[i]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) save(scores + h * PART + 16 * i, scale * s[h][i]);
}

// Calls work(N) for as many of `count` queries at a time as registers hold: N is a number as a type.
template <class Work>
inline void by_tiles(int64_t first, int64_t end, Work work) {
    int64_t j = first;
    for (; j + HEADS <= end; j += HEADS) work(std::integral_constant<int, HEADS>{}, j);
    if constexpr (HEADS == 6) {
        if (end - j >= 3) {
            work(std::integral_constant<int, 3>{}, j);
            j += 3;
        }
        if (end - j == 2) {
            work(std::integral_constant<int, 2>{}, j);
            j += 2;
        }
    }
    if (j < end) work(std::integral_constant<int, 1>{}, j);
}

template <class T>
struct Attention : Sequences {
    static constexpr int EACH = Row<T>::EACH;
    const T* q;  // row r, head h at r * q_stride + h * dim
    int64_t q_stride;
    const T *keys, *values;  // [blocks, block size, KV heads, dim]
    int64_t heads, kv_heads, dim;
    float scale;
    T* out;  // [rows, heads, dim]

    int64_t group() const { return heads / kv_heads; }
    int64_t width() const { return (dim + 16 * VECTORS - 1) / (16 * VECTORS) * (16 * VECTORS); }  // dim and zeros
    int64_t result_size() const { return EXTRA + width(); }
    int64_t num_factors() const { return (dim + 16 * EACH - 1) / (16 * EACH) * 16; }  // of a query and a key

    // Query j of a piece: its rows one after the other, of each all heads of the group.
    int64_t element(const Piece& piece, int64_t j) const {  // of q and, with heads * dim for stride, of out
        return (piece.kv_head * group() + j % group()) * dim;
    }
    int64_t row(const Piece& piece, int64_t j) const { return starts[piece.sequence] + piece.first + j / group(); }
    int64_t seen(const Piece& piece, int64_t j) const {  // cached tokens, from the first on
        return lengths[piece.sequence] - counts[piece.sequence] + piece.first + j / group() + 1;
    }

    void ask_for(const T* row) const {
        for (int64_t at = 0; at < dim; at += 64 / sizeof(T)) __builtin_prefetch(row + at);
    }

    // Scores [queries, PART] of `count` tokens, BLOCK at a time: their keys are turned, so that lanes are tokens.
    void score(const float* queries, int64_t num_queries, const T* const* keys_of, const T* const* values_of,
               int64_t count, float* turned, float* scores) const {
        for (int64_t t = 0; t < count; t += BLOCK) {
            int64_t n = count - t < BLOCK ? count - t : BLOCK;
            for (int64_t i = t; i < t + n; ++i) {
                ask_for(values_of[i]);
                if (i + BLOCK < count) ask_for(keys_of[i + BLOCK]);
            }
            turn(keys_of + t, n, dim, turned);
            by_tiles(0, num_queries, [&](auto h, int64_t j) __attribute__((always_inline)) {
                for (int64_t v = 0; v < n; v += 16 * VECTORS)
                    multiply<T, decltype(h)::value>(queries + j * num_factors(), turned + v, num_factors(), scale,
                                                    scores + j * PART + t + v);
            });
        }
    }

    // The first `count` scores become weights that are not yet divided by their sum, the others up to `end` 0; rounded
    // as T, they are factors.
    static void weigh(float* scores, int64_t count, int64_t end, float* result) {
        for (int64_t t = count; t % 16; ++t) scores[t] = -__builtin_inff();
        f32x16 best = load<f32x16>(scores), added{};
        for (int64_t t = 16; t < count; t += 16) best = larger(best, load<f32x16>(scores + t));
        float most = largest(best);
        for (int64_t t = 0; t < end; t += 16) {
            f32x16 w = t < count ? exponential_of_negative(load<f32x16>(scores + t) - most) : f32x16{};
            if constexpr (EACH == 2) {
                u16x16 pairs = to_bf16(w);
                w = to_float(pairs);
                save((T*)scores + t, pairs);
            } else {
                w = rounded<T>(w);
                save(scores + t, in_place<T>(w));
            }
            added += w;
        }
        result[0] = most;
        result[1] = sum(added);
    }

    // Factors of `count` tokens' values: [BLOCK / EACH, width].
    void line_up(const T* const* values_of, int64_t count, float* block) const {
        auto some = [&](int64_t t, int64_t d) __attribute__((always_inline)) {
            return t < count ? load_up_to_16(values_of[t] + d, dim - d) : f32x16{};
        };
        for (int64_t t = 0; t < count + count % 2; t += EACH)
            for (int64_t d = 0; d < width(); d += 16) {
                f32x16 v = some(t, d);
                if constexpr (EACH == 2) v = (f32x16)((u32x16)v >> 16 | (u32x16)some(t + 1, d));
                save(block + Row<T>::place(t) * width() + d, v);
            }
    }

    // Queries from `first` on over the tokens [from, from + count): to results [queries, EXTRA + width].
    void run_part(const Piece& piece, const Room& room, int64_t first, int64_t num_queries, int64_t from, int64_t count,
                  float* results) const {
        const T *keys_of[PART], *values_of[PART];
        const int64_t* table = tables + piece.sequence * table_width;
        for (int64_t i = 0; i < count; ++i) {
            int64_t t = from + i;
            int64_t slot = table[t / block_size] * block_size + t % block_size;
            int64_t at = (slot * kv_heads + piece.kv_head) * dim;
            keys_of[i] = keys + at;
            values_of[i] = values + at;
        }
        score(room.queries + first * num_factors(), num_queries - first, keys_of, values_of, count, room.block,
              room.scores + first * PART);
        for (int64_t j = first; j < num_queries; ++j) {
            int64_t own = seen(piece, j) - from;
            weigh(room.scores + j * PART, own < count ? own : count, count, results + j * result_size());
            for (int64_t d = 0; d < width(); d += 16) save(results + j * result_size() + EXTRA + d, f32x16{});
        }
        for (int64_t t = 0; t < count; t += BLOCK) {
            int64_t n = count - t < BLOCK ? count - t : BLOCK;
            line_up(values_of + t, n, room.block);
            by_tiles(first, num_queries, [&](auto h, int64_t j) __attribute__((always_inline)) {
                for (int64_t d = 0; d < width(); d += 16 * VECTORS)
                    add_values<T, decltype(h)::value>(room.block + d, width(), room.scores + j * PART + t / EACH,
                                                      (n + n % 2) / EACH, results + j * result_size() + EXTRA + d,
                                                      result_size());
            });
        }
    }

    void run(const Piece& piece, const Room& room) const {
        int64_t num_queries = piece.count * group();
        for (int64_t j = 0; j < num_queries; ++j) {
            const T* own = q + row(piece, j) * q_stride + element(piece, j);
            for (int64_t p = 0; p < num_factors(); p += 16)
                save(room.queries + j * num_factors() + p, in_place<T>(load_factors(own + p * EACH, dim - p * EACH)));
        }
        if (piece.partial) return run_part(piece, room, 0, num_queries, piece.from, piece.to - piece.from, piece.partial);
        for (int64_t from = piece.from; from < piece.to; from += PART) {
            int64_t count = piece.to - from < PART ? piece.to - from : PART;
            int64_t first = 0;  // that sees one of these tokens
            while (seen(piece, first) <= from) first += group();
            float* to = from == piece.from ? room.results : room.part;
            run_part(piece, room, first, num_queries, from, count, to);
            for (int64_t j = first; to == room.part && j < num_queries; ++j)
                add_part(room.results + j * result_size(), to + j * result_size(), width());
        }
        for (int64_t j = 0; j < num_queries; ++j)
            write(row(piece, j), element(piece, j), room.results + j * result_size());
    }

    void write(int64_t row, int64_t element, const float* result) const {
        T* to = out + row * heads * dim + element;
        for (int64_t d = 0; d < dim; d += 16)
            save_up_to_16(to + d, load_up_to_16(result + EXTRA + d, dim - d) / result[1], dim - d);
    }

    // The parts of the one new token of a sequence.
    void join(int64_t sequence, float* partial) const {
        int64_t num_parts = (lengths[sequence] + PART - 1) / PART, size = group() * result_size();
        for (int64_t kv = 0; kv < kv_heads; ++kv, partial += num_parts * size) {
            for (int64_t j = 0; j < group(); ++j) {
                float* result = partial + j * result_size();
                for (int64_t p = 1; p < num_parts; ++p) add_part(result, result + p * size, width());
                write(starts[sequence], (kv * group() + j) * dim, result);
            }
        }
    }

    bool is_cut(int64_t s) const { return counts[s] == 1 && lengths[s] > PART; }

    Work cut() const {
        int64_t at_once = QUERIES / group() > 0 ? QUERIES / group() : 1;
        Work work;
        work.rooms.resize(num_sequences + 1);
        for (int64_t s = 0; s < num_sequences; ++s) {
            int64_t num_parts = (lengths[s] + PART - 1) / PART;
            work.rooms[s + 1] = work.rooms[s] + (is_cut(s) ? num_parts * heads * result_size() : 0);
            work.size += counts[s] * lengths[s] * heads * dim;
        }
        work.partials.resize(work.rooms[num_sequences]);
        for (int64_t s = 0; s < num_sequences; ++s) {
            float* partial = work.partials.data() + work.rooms[s];
            for (int64_t kv = 0; kv < kv_heads; ++kv) {
                for (int64_t from = 0; is_cut(s) && from < lengths[s]; from += PART, partial += group() * result_size())
                    work.pieces.push_back({s, kv, 0, 1, from, lengths[s] < from + PART ? lengths[s] : from + PART, partial});
                // The last ones see most: first, so that no thread is left with a long one.
                for (int64_t end = is_cut(s) ? 0 : counts[s]; end > 0; end -= at_once) {
                    int64_t count = end < at_once ? end : at_once;
                    work.pieces.push_back({s, kv, end - count, count, 0, lengths[s] - counts[s] + end, nullptr});
                }
            }
        }
        return work;
    }

    // Of a team.
    void all(Team& team, Work& work) const {
        int64_t num_pieces = work.pieces.size(), most = 0;
        for (const Piece& piece : work.pieces) most = piece.count * group() > most ? piece.count * group() : most;
        int64_t of_results = most * result_size();
        std::vector<Line> lines((most * (num_factors() + PART) + width() * BLOCK + 2 * of_results) / 16 + 1);
        Room room{};
        room.scores = lines.data()->floats;
        room.block = room.scores + most * PART;
        room.results = room.block + width() * BLOCK;
        room.part = room.results + of_results;
        room.queries = room.part + of_results;
#pragma omp for schedule(dynamic) nowait
        for (int64_t p = 0; p < num_pieces; ++p) run(work.pieces[p], room);
        team.meet();
        if (work.partials.empty()) return;
#pragma omp for schedule(dynamic) nowait
        for (int64_t s = 0; s < num_sequences; ++s)
            if (is_cut(s)) join(s, work.partials.data() + work.rooms[s]);
        team.meet();
    }
};

}  // namespace
