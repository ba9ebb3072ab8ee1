// Layers at once, or a half of one: few rows are computed faster than Python goes from kernel to kernel, and than threads
// are put to sleep and woken in between. To the last bit what the kernels give one after the other.
#include "attention.h"
#include "pointwise.h"
#include "team.h"

namespace {

constexpr int64_t PART_OF_ROW = 1024;  // of a row's gates, that a thread takes at a time

// What follows is as `native.py` lays it out.
struct Step {
    Sequences sequences;
    const void *cos, *sin;  // [rows, dim / 2]
    const int64_t* slots;
    int64_t heads, kv_heads, dim;
    float scale, eps;
};

struct AttentionPart {
    Matrix qkv, o;
    const void *q_norm, *k_norm;  // null: none
    void *keys, *values;
};

struct MlpPart {
    Matrix gate_up, down;
};

struct Layer {
    const void* attention_norm;
    AttentionPart attention;
    const void* mlp_norm;
    MlpPart mlp;
};

// A step's attention, projections and all, with the room that it takes: for one layer after the other.
template <class T>
class Attends {
  public:
    Attends(const Step& step, int64_t num_rows)
        : step(step),
          num_rows(num_rows),
          num_heads(step.heads + 2 * step.kv_heads),
          projected(new T[num_rows * num_heads * step.dim]),
          q(new T[num_rows * step.heads * step.dim]),
          attended(new T[num_rows * step.heads * step.dim]),
          work(over(nullptr, nullptr).cut()) {}

    // Of a team.
    void run(Team& team, const T* x, int64_t x_stride, const AttentionPart& part, T* out) {
        multiply(team, x, x_stride, part.qkv, projected.get(), num_rows);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num_rows * num_heads; ++i) place(part, i / num_heads, i % num_heads);
        team.meet();
        over(part.keys, part.values).all(team, work);
        multiply(team, attended.get(), step.heads * step.dim, part.o, out, num_rows);
    }

  private:
    Attention<T> over(const void* keys, const void* values) const {
        return {step.sequences, q.get(),       step.heads * step.dim, (const T*)keys, (const T*)values,
                step.heads,     step.kv_heads, step.dim,              step.scale,     attended.get()};
    }

    // Head h of row t, of first all queries', then all keys', then all values', to where attention finds it.
    void place(const AttentionPart& part, int64_t t, int64_t h) const {
        int64_t heads = step.heads, kv_heads = step.kv_heads, dim = step.dim;
        T *from = projected.get() + (t * num_heads + h) * dim, *keys = (T*)part.keys, *values = (T*)part.values;
        const T* norm = (const T*)(h < heads ? part.q_norm : part.k_norm);
        int64_t cached = step.slots[t] * kv_heads * dim;
        if (h >= heads + kv_heads) {
            std::memcpy(values + cached + (h - heads - kv_heads) * dim, from, dim * sizeof(T));
            return;
        }
        if (norm) norm_row(from, norm, step.eps, from, dim);
        T* to = h < heads ? q.get() + (t * heads + h) * dim : keys + cached + (h - heads) * dim;
        rotate_row(from, (const T*)step.cos + t * (dim / 2), (const T*)step.sin + t * (dim / 2), to, dim);
    }

    const Step& step;
    int64_t num_rows, num_heads;
    std::unique_ptr<T[]> projected, q, attended;
    Work work;
};

// A gated MLP, with the room that it takes.
template <class T>
class Gates {
  public:
    Gates(int64_t size, int64_t num_rows)
        : size(size), num_rows(num_rows), both(new T[num_rows * 2 * size]), inner(new T[num_rows * size]) {}

    // Of a team.
    void run(Team& team, const T* x, int64_t x_stride, const MlpPart& part, T* out) {
        int64_t num_parts = (size + PART_OF_ROW - 1) / PART_OF_ROW;
        multiply(team, x, x_stride, part.gate_up, both.get(), num_rows);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num_rows * num_parts; ++i) {
            int64_t t = i / num_parts, first = i % num_parts * PART_OF_ROW;
            int64_t count = size - first < PART_OF_ROW ? size - first : PART_OF_ROW;
            const T* gate = both.get() + t * 2 * size + first;
            gate_row(gate, gate + size, inner.get() + t * size + first, count);
        }
        team.meet();
        multiply(team, inner.get(), size, part.down, out, num_rows);
    }

  private:
    int64_t size, num_rows;
    std::unique_ptr<T[]> both, inner;
};

template <class T>
void run_layers(const Layer* layers, int64_t num_layers, const Step& step, const T* x, int64_t x_stride, T* out,
                int64_t num_rows, int64_t hidden, int num_threads) {
    Attends<T> attention(step, num_rows);
    Gates<T> mlp(layers->mlp.down.size, num_rows);
    std::unique_ptr<T[]> normed(new T[num_rows * hidden]), added(new T[num_rows * hidden]());
    Team team;
#pragma omp parallel num_threads(num_threads) if (layers->mlp.gate_up.num_bytes() > WORTH_A_TEAM)
    {
        // Takes up what the part before has added; `weight` is of the norm of what the next one is given.
        auto go_on = [&](const T* from, int64_t stride, bool adds, const void* weight) {
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < num_rows; ++t) {
                T* to = out + t * hidden;
                if (from != out) std::memcpy(to, from + t * stride, hidden * sizeof(T));
                if (adds) add_row(to, added.get() + t * hidden, hidden);
                if (weight) norm_row(to, (const T*)weight, step.eps, normed.get() + t * hidden, hidden);
            }
            team.meet();
        };
        go_on(x, x_stride, false, layers->attention_norm);
        for (int64_t i = 0; i < num_layers; ++i) {
            const Layer& layer = layers[i];
            attention.run(team, normed.get(), hidden, layer.attention, added.get());
            go_on(out, hidden, true, layer.mlp_norm);
            mlp.run(team, normed.get(), hidden, layer.mlp, added.get());
            go_on(out, hidden, true, i + 1 < num_layers ? layers[i + 1].attention_norm : nullptr);
        }
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void attend_whole_##SUFFIX(const T* x, int64_t x_stride, const AttentionPart* part, const Step* step,   \
                                          T* out, int64_t num_rows, int num_threads) {                                 \
        Attends<T> attention(*step, num_rows);                                                                         \
        Team team;                                                                                                     \
        _Pragma("omp parallel num_threads(num_threads) if (part->qkv.num_bytes() > WORTH_A_TEAM)")                     \
        attention.run(team, x, x_stride, *part, out);                                                                  \
    }                                                                                                                  \
    extern "C" void mlp_##SUFFIX(const T* x, int64_t x_stride, const MlpPart* part, T* out, int64_t num_rows,          \
                                 int num_threads) {                                                                    \
        Gates<T> mlp(part->down.size, num_rows);                                                                       \
        Team team;                                                                                                     \
        _Pragma("omp parallel num_threads(num_threads) if (part->gate_up.num_bytes() > WORTH_A_TEAM)")                 \
        mlp.run(team, x, x_stride, *part, out);                                                                        \
    }                                                                                                                  \
    extern "C" void run_layers_##SUFFIX(const Layer* layers, int64_t num_layers, const Step* step, const T* x,         \
                                        int64_t x_stride, T* out, int64_t num_rows, int64_t hidden,                    \
                                        int num_threads) {                                                             \
        run_layers(layers, num_layers, *step, x, x_stride, out, num_rows, hidden, num_threads);                        \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
