// Paged attention of one new token per sequence: keys and values are read where they lie.
//
// A piece of work is one KV head of PART tokens of one sequence; parts are put together in their order. How a sequence
// is cut depends on its own length alone, so neighbours do not change its bits; nothing but its own tokens is read.
#include <vector>

#include "tile.h"

namespace {

constexpr int64_t PART = 512;  // tokens
constexpr int64_t MANY = 1 << 18;  // elements of scored keys, over all heads, that are worth several threads
constexpr int64_t AHEAD = 16;  // tokens whose keys are asked for before they are multiplied
#if defined(__AVX512F__)
constexpr int HEADS = 4, VECTORS = 4;  // of sums of values that are kept in registers
#else
constexpr int HEADS = 2, VECTORS = 2;
#endif

struct Piece {
    int64_t sequence, kv_head, from, to;
    float* partial;  // by head of the group: largest score, sum of weights, weighted values; null: it is the only part
};

// sums[h][d] += weights[h][t] * values[t][d], for H heads and V vectors of d.
template <class T, int H, int V>
inline void add_values(const T* const* values, const float* weights, int64_t weights_stride, int64_t count,
                       int64_t first, int64_t dim, float* sums) {
    f32x16 s[H][V] = {};
    bool whole = first + 16 * V <= dim;
    for (int64_t t = 0; t < count; ++t) {
        f32x16 v[V];
        const T* from = values[t] + first;
        if (whole) {
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) v[i] = Row<T>::load16(from + 16 * i);
        } else {
            for (int i = 0; i < V; ++i) v[i] = load_up_to_16(from + 16 * i, dim - first - 16 * i);
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            float weight = weights[h * weights_stride + t];
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) s[h][i] += weight * v[i];
        }
    }
    for (int h = 0; h < H; ++h)
        for (int i = 0; i < V; ++i) save_up_to_16(sums + h * dim + first + 16 * i, s[h][i], dim - first - 16 * i);
}

template <class T, int V>
inline void add_values_of(int heads, const T* const* values, const float* weights, int64_t stride, int64_t count,
                          int64_t first, int64_t dim, float* sums) {
    if constexpr (HEADS == 4) {
        if (heads == 4) return add_values<T, 4, V>(values, weights, stride, count, first, dim, sums);
        if (heads == 3) return add_values<T, 3, V>(values, weights, stride, count, first, dim, sums);
    }
    if (heads == 2) return add_values<T, 2, V>(values, weights, stride, count, first, dim, sums);
    add_values<T, 1, V>(values, weights, stride, count, first, dim, sums);
}

template <class T>
struct Attention {
    const T* q;  // row r, head h at r * q_stride + h * dim
    int64_t q_stride;
    const T *keys, *values;  // [blocks, block size, KV heads, dim]
    const int64_t *rows, *sequences, *lengths, *tables;
    int64_t table_width, num_sequences, block_size, heads, kv_heads, dim;
    float scale;
    T* out;  // [rows, heads, dim]

    int64_t group() const { return heads / kv_heads; }
    int64_t partial_size() const { return group() * (2 + dim); }

    void ask_for(const T* row) const {
        for (int64_t at = 0; at < dim; at += 64 / sizeof(T)) __builtin_prefetch(row + at);
    }

    // Scores [group, PART] of a piece's tokens, their keys being rows; behind the last token -inf.
    void score(const Piece& piece, const T* const* keys_of, const T* const* values_of, float* scores) const {
        int64_t count = piece.to - piece.from;
        Widened<T> queries(group(), dim);
        for (int64_t g = 0; g < group(); ++g)
            queries.take(g, q + rows[piece.sequence] * q_stride + (piece.kv_head * group() + g) * dim);
        for (int64_t g = 0; g < group(); g += COLUMNS) {
            int width = group() - g < COLUMNS ? group() - g : COLUMNS;
            const float* const* own = queries.rows.data() + g;
            for (int64_t t = 0; t < count;) {
                int n = count - t >= ROWS ? ROWS : 1;
                for (int64_t i = t; g == 0 && i < t + n; ++i) {
                    ask_for(values_of[i]);
                    if (i + AHEAD < count) ask_for(keys_of[i + AHEAD]);
                }
                f32x16 sums = scale * (n == ROWS ? tile_of<T, ROWS>(width, keys_of + t, own, dim, 0)
                                                 : tile_of<T, 1>(width, keys_of + t, own, dim, 0));
                for (int c = 0; c < width; ++c)
                    std::memcpy(scores + (g + c) * PART + t, (const float*)&sums + c * n, n * sizeof(float));
                t += n;
            }
        }
        for (int64_t g = 0; g < group(); ++g)
            for (int64_t t = count; t % 16; ++t) scores[g * PART + t] = -__builtin_inff();
    }

    // Scores become weights that are not yet divided by their sum.
    static void weigh(float* scores, int64_t count, float& most, float& total) {
        f32x16 best = load<f32x16>(scores), added{};
        for (int64_t t = 16; t < count; t += 16) best = larger(best, load<f32x16>(scores + t));
        most = largest(best);
        for (int64_t t = 0; t < count; t += 16) {
            f32x16 w = exponential(load<f32x16>(scores + t) - most);
            added += w;
            save(scores + t, w);
        }
        total = sum(added);
    }

    void run(const Piece& piece, float* scores, float* sums) const {
        const T *keys_of[PART], *values_of[PART];
        int64_t count = piece.to - piece.from;
        const int64_t* table = tables + sequences[piece.sequence] * table_width;
        for (int64_t i = 0; i < count; ++i) {
            int64_t t = piece.from + i;
            int64_t slot = table[t / block_size] * block_size + t % block_size;
            int64_t at = (slot * kv_heads + piece.kv_head) * dim;
            keys_of[i] = keys + at;
            values_of[i] = values + at;
        }
        score(piece, keys_of, values_of, scores);
        for (int64_t g = 0; g < group(); g += HEADS) {
            int width = group() - g < HEADS ? group() - g : HEADS;
            float most[HEADS], total[HEADS];
            for (int h = 0; h < width; ++h) weigh(scores + (g + h) * PART, count, most[h], total[h]);
            for (int64_t d = 0; d < dim; d += 16 * VECTORS)
                add_values_of<T, VECTORS>(width, values_of, scores + g * PART, PART, count, d, dim, sums);
            for (int h = 0; h < width; ++h) keep(piece, g + h, most[h], total[h], sums + h * dim);
        }
    }

    void keep(const Piece& piece, int64_t g, float most, float total, const float* sums) const {
        if (piece.partial) {
            float* to = piece.partial + g * (2 + dim);
            to[0] = most;
            to[1] = total;
            std::memcpy(to + 2, sums, dim * sizeof(float));
        } else {
            write(piece.sequence, piece.kv_head * group() + g, sums, total);
        }
    }

    void write(int64_t sequence, int64_t head, const float* sums, float total) const {
        T* to = out + (rows[sequence] * heads + head) * dim;
        for (int64_t d = 0; d < dim; d += 16) save_up_to_16(to + d, load_up_to_16(sums + d, dim - d) / total, dim - d);
    }

    // Parts of one head, `stride` floats from one to the next.
    void join(int64_t sequence, int64_t head, float* partial, int64_t stride, int64_t num_parts) const {
        float most = partial[0], total = 0.0f;
        for (int64_t p = 1; p < num_parts; ++p) most = partial[p * stride] > most ? partial[p * stride] : most;
        for (int64_t p = 0; p < num_parts; ++p) {
            float* part = partial + p * stride;
            float factor = exponential(fill(part[0] - most))[0];
            total += part[1] * factor;
            for (int64_t d = 0; d < dim; ++d) partial[2 + d] = (p ? partial[2 + d] : 0.0f) + part[2 + d] * factor;
        }
        write(sequence, head, partial + 2, total);
    }

    void all(int num_threads) const {
        std::vector<Piece> pieces;
        std::vector<int64_t> starts(num_sequences + 1);  // of each sequence's partial results, in floats
        for (int64_t s = 0; s < num_sequences; ++s) {
            int64_t num_parts = (lengths[s] + PART - 1) / PART;
            starts[s + 1] = starts[s] + (num_parts > 1 ? num_parts * kv_heads * partial_size() : 0);
        }
        std::vector<float> room(starts[num_sequences]);
        for (int64_t s = 0; s < num_sequences; ++s) {
            float* partial = starts[s + 1] > starts[s] ? room.data() + starts[s] : nullptr;
            for (int64_t kv = 0; kv < kv_heads; ++kv)
                for (int64_t from = 0; from < lengths[s]; from += PART) {
                    pieces.push_back({s, kv, from, lengths[s] < from + PART ? lengths[s] : from + PART, partial});
                    if (partial) partial += partial_size();
                }
        }
        int64_t num_pieces = pieces.size(), num_tokens = 0;
        for (int64_t s = 0; s < num_sequences; ++s) num_tokens += lengths[s];
#pragma omp parallel num_threads(num_threads) if (num_tokens * heads * dim > MANY)
        {
            std::vector<float> scores(group() * PART), sums(HEADS * dim);
#pragma omp for schedule(dynamic)
            for (int64_t p = 0; p < num_pieces; ++p) run(pieces[p], scores.data(), sums.data());
#pragma omp for schedule(dynamic)
            for (int64_t s = 0; s < num_sequences; ++s) {
                int64_t num_parts = (lengths[s] + PART - 1) / PART;
                for (int64_t h = 0; num_parts > 1 && h < heads; ++h) {
                    float* of_kv = room.data() + starts[s] + h / group() * num_parts * partial_size();
                    join(s, h, of_kv + h % group() * (2 + dim), partial_size(), num_parts);
                }
            }
        }
    }
};

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void attend_##SUFFIX(const T* q, int64_t q_stride, const T* keys, const T* values, const int64_t* rows, \
                                    const int64_t* sequences, const int64_t* lengths, const int64_t* tables,           \
                                    int64_t table_width, int64_t num_sequences, int64_t block_size, int64_t heads,     \
                                    int64_t kv_heads, int64_t dim, float scale, T* out, int num_threads) {             \
        Attention<T>{q,      q_stride,    keys,          values,     rows,  sequences, lengths, tables,                \
                     table_width, num_sequences, block_size, heads, kv_heads,  dim,     scale,  out}                   \
            .all(num_threads);                                                                                         \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
