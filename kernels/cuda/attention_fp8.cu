// Block-sparse attention forward with log-sum-exp on 8-bit numbers, for compute capability 9.0a, head dim up to 128.
//
// Roles, tiles and rings are those of attention.cu. Queries, keys and values lie in the order of slots, as quantising
// wrote them, so that only outputs go through an index. Weights and values are e4m3, queries and keys e4m3 or INT8.
// The matrix unit adds 8-bit products with about 13 bits: the products of each block start from 0 and are added here.
//
// The order of a step is what the speed depends on: scores of block i and output of block i - 1 are started together,
// half of the exponentials of block i run before the wait for that output, half after it.
//
// Macros: EIGHT_BITS; WIDTH = 128; PERMUTED = 0; STAGES, how many blocks are in the ring, keys and values together.
// INT8, the type of queries and keys, else e4m3. FP16, the type of the output, else bfloat16.
#include "producer.cuh"

constexpr float WEIGHT_BITS = 8.0f;  // weights are at most 2^8, below the 448 of e4m3

#ifdef INT8
// As integers, MAGIC_BITS + i are the bits of MAGIC + i while |i| < 2^22; scores are at most 128 * 127 * 127 < 2^21.
using Score = int32;
constexpr float MAGIC = 12582912.0f;
constexpr int32 MAGIC_BITS = 0x4B400000;
constexpr int32 CUT = static_cast<int32>(0xFF800000u - 0x4B400000u);  // becomes -inf
__device__ __forceinline__ float number_of(Score score) { return __int_as_float(score + MAGIC_BITS); }
__device__ __forceinline__ float weight_of(Score place) { return __int_as_float(place); }
__device__ __forceinline__ Score place_of(float weight) { return __float_as_int(weight); }
__device__ __forceinline__ Score larger(Score a, Score b) { return max(a, b); }
__device__ __forceinline__ float scaled(Score top, float factor) {
    return top == CUT ? -INFINITY_ : static_cast<float>(top) * factor;
}
#else
using Score = float;
constexpr float MAGIC = 0.0f;
#define CUT (-INFINITY_)
__device__ __forceinline__ float number_of(Score score) { return score; }
__device__ __forceinline__ float weight_of(Score place) { return place; }
__device__ __forceinline__ Score place_of(float weight) { return weight; }
__device__ __forceinline__ Score larger(Score a, Score b) { return fmaxf(a, b); }
__device__ __forceinline__ float scaled(Score top, float factor) { return top * factor; }
#endif

// Scores of 64 queries and one block of keys, started.
__device__ __forceinline__ void start_scores(Score (&score)[KEYS / 2], uint64 query, int stage) {
    const uint64 key = operand(shared_address(memory) + RING, 0, 1024) + stage * (BLOCK_BYTES / 16);
#pragma unroll
    for (int k = 0; k < WIDTH / 32; k++) wgmma_shared_8(score, query + 2 * k, key + 2 * k, k > 0);
    wgmma_commit();
}

// The weighted values of one block, started.
__device__ __forceinline__ void start_output(float (&fresh)[WIDTH / 2], const uint32 (&weight)[KEYS / 8], int stage) {
    const uint64 value = operand(shared_address(memory) + RING, 0, 1024) + stage * (BLOCK_BYTES / 16);
#pragma unroll
    for (int k = 0; k < KEYS / 32; k++) wgmma_registers_8(fresh, weight + 4 * k, value + 2 * k, k > 0);
    wgmma_commit();
}

// -inf for what lies beyond the keys of a short block.
__device__ __forceinline__ void cut(Score (&score)[KEYS / 2], int length, int lane) {
    const int left = length - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + i % 2 >= left) score[i] = CUT;
}

// What a thread knows of its two rows: the largest score, base 2, and its part of the sum of weights.
struct Rows {
    float top[2], sum[2];
};

// How the scores of a block become weights 2^8 exp2(score - top) = exp2(number factor + offset), and what the sums
// before are multiplied by.
struct Measure {
    float factor, offset[2], shrink[2];
};

template <bool TESTED>
__device__ __forceinline__ Measure measure(const Score (&score)[KEYS / 2], Rows& rows, float factor) {
    Measure found;
    found.factor = factor;
    float top[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
        Score a = score[2 * u], b = score[2 * u + 1];
#pragma unroll
        for (int j = 1; j < KEYS / 8; j++) {
            a = larger(a, score[4 * j + 2 * u]);
            b = larger(b, score[4 * j + 2 * u + 1]);
        }
        a = larger(a, b);
        a = larger(a, __shfl_xor_sync(0xFFFFFFFF, a, 1));
        a = larger(a, __shfl_xor_sync(0xFFFFFFFF, a, 2));
        top[u] = fmaxf(rows.top[u], scaled(a, factor));
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
        // A query that has met no key yet keeps -inf: subtract 0 there.
        const float base = TESTED && top[u] == -INFINITY_ ? 0.0f : top[u];
        found.shrink[u] = exp2_fast(rows.top[u] - base);
        found.offset[u] = WEIGHT_BITS - base - MAGIC * factor;
        rows.top[u] = top[u];
    }
    return found;
}

// The scores of row u become weights, and are added up.
__device__ __forceinline__ void weigh(Score (&score)[KEYS / 2], Rows& rows, const Measure& by, int u) {
    float a = rows.sum[u] * by.shrink[u], b = 0.0f;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) {
        Score& first = score[4 * j + 2 * u];
        Score& second = score[4 * j + 2 * u + 1];
        const float x = exp2_fast(number_of(first) * by.factor + by.offset[u]);
        const float y = exp2_fast(number_of(second) * by.factor + by.offset[u]);
        first = place_of(x);
        second = place_of(y);
        a += x;
        b += y;
    }
    rows.sum[u] = a + b;
}

// Weights as operand of the next product; the values' keys lie in the order in which a thread holds them.
__device__ __forceinline__ void pack_all(uint32 (&weight)[KEYS / 8], const Score (&place)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
        const Score* x = place + i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
        weight[i] = pack_8(weight_of(x[0]), weight_of(x[1]), weight_of(x[4]), weight_of(x[5]));
    }
}

__device__ __forceinline__ void add(float (&out)[WIDTH / 2], const float (&fresh)[WIDTH / 2],
                                    const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) out[i] = out[i] * shrink[i / 2 % 2] + fresh[i];
}

// Scores and softmax of the block at `place`, output of the block before it; shrink: what the output so far is
// multiplied by for that block, and on return for this one.
template <bool TESTED>
__device__ __forceinline__ void step(Score (&score)[KEYS / 2], float (&fresh)[WIDTH / 2], float (&out)[WIDTH / 2],
                                     uint32 (&weight)[KEYS / 8], Rows& rows, float (&shrink)[2], uint64 query,
                                     Place& place, int lane) {
    const Place key = place;
    place.next();
    const Place value = place;
    place.next();
    await(key);
    const float factor = shared().factors[key.stage];
    const int length = TESTED ? shared().lengths[key.stage] : KEYS;
    wgmma_fence();
    start_scores(score, query, key.stage);
    await(value);
    start_output(fresh, weight, value.stage);
    wgmma_wait<1>();
    pin(score);
    give_back(key.stage, lane);
    if (TESTED && length < KEYS) cut(score, length, lane);
    const Measure by = measure<TESTED>(score, rows, factor);
    weigh(score, rows, by, 0);
    // What is waited for here is used next; the loop of this wait keeps the assembler from moving what stands above
    // behind the wait for the output, and what stands below before it.
    await(place);
    wgmma_wait<0>();
    weigh(score, rows, by, 1);
    pin(fresh);
    add(out, fresh, shrink);
    give_back(value.stage, lane);
    shrink[0] = by.shrink[0];
    shrink[1] = by.shrink[1];
    pack_all(weight, score);
}

// Divides by the sums and writes output and log-sum-exp of the 16 queries of a warp.
__device__ __forceinline__ void finish(const Arguments& arguments, const Tile& here, const float (&out)[WIDTH / 2],
                                       const Rows& rows, int warp, int lane) {
    const int64 head = static_cast<int64>(here.batch) * arguments.heads + here.head;
    const float* scale = arguments.value_scale + head * arguments.value_dim;
#pragma unroll
    for (int u = 0; u < 2; u++) {
        float sum = rows.sum[u];
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
        // Queries without a key give 0 and -inf.
        const bool empty = sum == 0.0f;
        const float inverse = 1.0f / sum;
        const int64 place = static_cast<int64>(here.block) * QUERIES + warp * 16 + lane / 4 + 8 * u;
        int64 token = place;
        if (arguments.index != nullptr)
            token = arguments.index[here.batch * arguments.index_b + here.head * arguments.index_h + place];
        if (token < 0 || token >= arguments.tokens) continue;  // padding
        if (lane % 4 == 0) {
            const float shift = arguments.shift[head * arguments.query_blocks * QUERIES + place];
            arguments.lse[head * arguments.tokens + token] =
                empty ? -INFINITY_ : (rows.top[u] - WEIGHT_BITS + __log2f(sum)) * LN_2 + shift;
        }
        const int64 row = (here.batch * static_cast<int64>(arguments.tokens) + token) * arguments.heads + here.head;
        uint32* target = reinterpret_cast<uint32*>(arguments.out_rows) + row * (arguments.value_dim / 2);
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++) {
            const int column = 8 * j + lane % 4 * 2;
            if (column < arguments.value_dim) {
                const float x = out[4 * j + 2 * u] * inverse * scale[column];
                const float y = out[4 * j + 2 * u + 1] * inverse * scale[column + 1];
                target[column / 2] = empty ? 0u : pack(x, y);
            }
        }
    }
}

// Group `group` of the consumers: its 64 queries of each tile.
__device__ __forceinline__ void consume(const Arguments& arguments, int group, int lane) {
    const int warp = group * 4 + threadIdx.x / 32 % 4;
    Place place = {0, 0};
    for (uint32 round = 0;; round++) {
        const int slot = round % SLOTS;
        const uint32 phase = round / SLOTS & 1;
        const Tile& here = await_tile(slot, phase);
        const int whole = here.whole, real = here.real;
        if (real < 0) break;
        mbarrier_wait(shared_address(&shared().query_ready[slot]), phase);
        const uint64 query = operand(shared_address(memory) + slot * BLOCK_BYTES + group * (64 * 128), 0, 1024);
        Score score[KEYS / 2];
        float fresh[WIDTH / 2], out[WIDTH / 2], shrink[2] = {1.0f, 1.0f};
        uint32 weight[KEYS / 8];
        Rows rows = {{-INFINITY_, -INFINITY_}, {0.0f, 0.0f}};
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) out[i] = 0.0f;
        if (real > 0) {
            await(place);
            const float factor = shared().factors[place.stage];
            const int length = shared().lengths[place.stage];
            wgmma_fence();
            start_scores(score, query, place.stage);
            wgmma_wait<0>();
            pin(score);
            give_back(place.stage, lane);
            place.next();
            if (length < KEYS) cut(score, length, lane);
            const Measure by = measure<true>(score, rows, factor);
            weigh(score, rows, by, 0);
            weigh(score, rows, by, 1);
            pack_all(weight, score);
            int i = 1;
#pragma unroll 1
            for (; i < whole; i++) step<false>(score, fresh, out, weight, rows, shrink, query, place, lane);
#pragma unroll 1
            for (; i < real; i++) step<true>(score, fresh, out, weight, rows, shrink, query, place, lane);
            await(place);
            wgmma_fence();
            start_output(fresh, weight, place.stage);
            wgmma_wait<0>();
            pin(fresh);
            add(out, fresh, shrink);
            give_back(place.stage, lane);
            place.next();
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&shared().query_free[slot]));
        finish(arguments, here, out, rows, warp, lane);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&shared().tile_free[slot]));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_fp8(const __grid_constant__ Arguments arguments) {
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(shared_address(&shared().ready[i]), 1);
            mbarrier_init(shared_address(&shared().free[i]), CONSUMER_WARPS);
        }
        for (int i = 0; i < SLOTS; i++) {
            mbarrier_init(shared_address(&shared().query_ready[i]), 1);
            mbarrier_init(shared_address(&shared().query_free[i]), CONSUMER_WARPS);
            mbarrier_init(shared_address(&shared().tile_ready[i]), 1);
            mbarrier_init(shared_address(&shared().tile_free[i]), CONSUMER_WARPS + 1);
        }
        fence_barrier_init();
        prefetch_map(&arguments.query);
        prefetch_map(&arguments.key);
        prefetch_map(&arguments.value);
    }
    __syncthreads();
    if (warp < 4) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (warp == 0)
            produce(arguments, lane);
        else if (warp == 1)
            schedule(arguments, lane);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(arguments, warp / 4 - 1, lane);
    }
}
