// Block-sparse attention forward with log-sum-exp for compute capability 9.0a.
//
// One program computes tiles of 128 queries of one head, one after the other. Warps have roles: of the first group of
// four, one decides which tile is next, one copies keys and values into a ring of shared memory, two read queries that
// go through an index; two consumer groups compute 64 queries each and never wait for each other. The order inside a
// consumer is FlashAttention-3's (arXiv 2407.08608): the scores of a block are started, then the output of the block
// before it, and the softmax runs under the latter.
//
// Macros: WIDTH, head dim in shared memory, 64 or 128. STAGES, how many blocks are in the ring, keys and values
// together. PERMUTED, queries and outputs go through an index. FP16, the type of the activations, else bfloat16. SOFT,
// blocks that are not listed enter the softmax as their means, and how many key blocks there may be.
#include "producer.cuh"

// Where the source waits for the output of the block before: ahead of the exponentials, or after them. Wherever it
// stands the assembler puts some exponentials on either side, but not the same; chosen as measured.
constexpr bool EARLY = PERMUTED || WIDTH == 64;

// An operand 16 * `steps` bytes further on. Through an index the compiler has too few registers left to add up the
// halves of the queries' operand before the loop; addresses carry nothing into the upper half, which it does not know.
__device__ __forceinline__ uint64 further(uint64 operand, uint32 steps) {
    return PERMUTED ? operand >> 32 << 32 | static_cast<uint32>(static_cast<uint32>(operand) + steps) : operand + steps;
}

// Scores of 64 queries and one block of keys, started.
__device__ __forceinline__ void start_scores(float (&score)[KEYS / 2], uint64 query, int stage) {
    const uint64 key = operand(shared_address(memory) + RING, 0, 1024) + stage * (BLOCK_BYTES / 16);
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++) {
        const int step = (k / 4 * HALF_BYTES + k % 4 * 32) / 16;
        wgmma_shared(score, further(query, step), key + step, k > 0);
    }
    wgmma_commit();
}

// Adds the weighted values of one block, started.
__device__ __forceinline__ void start_output(float (&out)[WIDTH / 2], const uint32 (&weight)[KEYS / 4], int stage) {
    const uint64 value = operand(shared_address(memory) + RING, HALF_BYTES, 1024) + stage * (BLOCK_BYTES / 16);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) wgmma_transposed(out, weight + 4 * k, value + k * (16 * 128 / 16), 1);
    wgmma_commit();
}

// -inf for what lies beyond the keys of short blocks.
__device__ __forceinline__ void cut(float (&score)[KEYS / 2], int length, int lane) {
    const int left = (PARTS == 1 ? length : length & 0xFFFF) - lane % 4 * 2;
    const int left_of_second = KEY_BLOCK + (length >> 16) - lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + i % 2 >= (i / 4 * 8 < KEY_BLOCK ? left : left_of_second)) score[i] = -INFINITY_;
}

#ifdef SOFT
// Adds to the scores of one chunk of means what makes each as heavy as its block's keys; -inf for what is left out.
__device__ __forceinline__ void soften(float (&score)[KEYS / 2], const Arguments& arguments, const Tile& here,
                                       int chunk, int lane) {
    const int odd = here.odd[chunk];
    const float most = here.bias[chunk];
    const float* bias = arguments.mean_bias + here.batch * arguments.bias_b + here.head * arguments.bias_h +
                        chunk * KEYS + lane % 4 * 2;
    auto add = [&](int j, float first, float second) {
        const uint32 left_out = here.left_out[chunk * (KEYS / 32) + j / 4] >> (j % 4 * 8 + lane % 4 * 2);
        if (left_out & 1) first = -INFINITY_;
        if (left_out & 2) second = -INFINITY_;
        score[4 * j] += first;
        score[4 * j + 1] += second;
        score[4 * j + 2] += first;
        score[4 * j + 3] += second;
    };
    if (odd == MANY_ODD) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) add(j, bias[8 * j], bias[8 * j + 1]);
    } else {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) add(j, most, most);
    }
    if (odd < 0) return;
    const float more = here.odd_bias[chunk];
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (odd - lane % 4 * 2 == i / 4 * 8 + i % 2) score[i] += more;
}
#endif

// What a step's length asks of its scores.
__device__ __forceinline__ void adjust(float (&score)[KEYS / 2], const Arguments& arguments, const Tile& here,
                                       int length, int lane) {
#ifdef SOFT
    if (length < 0) {
        soften(score, arguments, here, ~length, lane);
        return;
    }
#endif
    if (length != FULL) cut(score, length, lane);
}

// What a thread knows of its two rows: the number that scores are measured from, and its part of the sum of weights.
struct Rows {
    float base[2], sum[2];
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

// Largest score of each row, those before included.
__device__ __forceinline__ void largest(const float (&score)[KEYS / 2], const Rows& rows, float (&top)[2]) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
        float a = fmaxf(rows.base[u], score[2 * u]), b = score[2 * u + 1];
#pragma unroll
        for (int j = 1; j < KEYS / 8; j++) {
            a = fmaxf(a, score[4 * j + 2 * u]);
            b = fmaxf(b, score[4 * j + 2 * u + 1]);
        }
        top[u] = quad_max(fmaxf(a, b));
    }
}

// Scores become weights exp2(scale (score - base)); adds them up.
template <bool TESTED>
__device__ __forceinline__ void weigh(float (&score)[KEYS / 2], Rows& rows, float scale_log2) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
        // A query that has met no key yet keeps -inf: subtract 0 there.
        const float base = TESTED && rows.base[u] == -INFINITY_ ? 0.0f : rows.base[u] * scale_log2;
        float a = 0.0f, b = 0.0f;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            float& first = score[4 * j + 2 * u];
            float& second = score[4 * j + 2 * u + 1];
            first = exp2_fast(first * scale_log2 - base);
            second = exp2_fast(second * scale_log2 - base);
            a += first;
            b += second;
        }
        rows.sum[u] += a + b;
    }
}

__device__ __forceinline__ void pack_all(uint32 (&weight)[KEYS / 4], const float (&score)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) weight[i] = pack(score[2 * i], score[2 * i + 1]);
}

// The rows' largest scores become the new base; shrink: what multiplies the sums before.
template <bool TESTED>
__device__ __forceinline__ void shift(const float (&score)[KEYS / 2], Rows& rows, float (&shrink)[2],
                                      float scale_log2) {
    float top[2];
    largest(score, rows, top);
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const float base = TESTED && top[u] == -INFINITY_ ? 0.0f : top[u];
        shrink[u] = exp2_fast((rows.base[u] - base) * scale_log2);
        rows.base[u] = top[u];
        rows.sum[u] *= shrink[u];
    }
}

__device__ __forceinline__ void scale_rows(float (&out)[WIDTH / 2], const float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) out[i] *= shrink[i / 2 % 2];
}

// Waits for the output of the block whose values are at `stage`.
__device__ __forceinline__ void take_output(float (&out)[WIDTH / 2], int stage, int lane) {
    wgmma_wait<0>();
    pin(out);
    give_back(stage, lane);
}

// Scores and softmax of the block at `place`, output of the block before it.
template <bool TESTED>
__device__ __forceinline__ void step(float (&score)[KEYS / 2], float (&out)[WIDTH / 2], uint32 (&weight)[KEYS / 4],
                                     Rows& rows, uint64 query, Place& place, const Arguments& arguments,
                                     const Tile& here, int lane) {
    const float scale_log2 = arguments.scale_log2;
    const Place key = place;
    place.next();
    const Place value = place;
    place.next();
    await(key);
    wgmma_fence();
    start_scores(score, query, key.stage);
    await(value);
    wgmma_fence();
    start_output(out, weight, value.stage);
    wgmma_wait<1>();
    pin(score);
    if (TESTED) {
        const int length = shared().lengths[key.stage];
        __syncwarp();  // all lanes have read it
        give_back(key.stage, lane);
        adjust(score, arguments, here, length, lane);
    } else {
        give_back(key.stage, lane);
    }
    float shrink[2];
    shift<TESTED>(score, rows, shrink, scale_log2);
    if (EARLY) take_output(out, value.stage, lane);
    weigh<TESTED>(score, rows, scale_log2);
    if (!EARLY) {
        pin(score);
        take_output(out, value.stage, lane);
    }
    scale_rows(out, shrink);
    pack_all(weight, score);
}

// Writes 16 queries of a warp, in shared memory at `source`, row by row where their tokens are.
__device__ __forceinline__ void scatter(const Arguments& arguments, const Tile& here, uint32 source,
                                        const int32* tokens, int lane) {
    constexpr int PIECES = WIDTH / 8, ROWS = 32 / PIECES;
    const int piece = lane % PIECES;
#pragma unroll
    for (int row = lane / PIECES; row < 16; row += ROWS) {
        const int token = tokens[row];
        const uint4 numbers = load_16(source + piece / 8 * HALF_BYTES + row * 128 + (piece % 8 ^ row % 8) * 16);
        const int64 target = (here.batch * static_cast<int64>(arguments.tokens) + token) * arguments.heads + here.head;
        if (token >= 0 && piece * 8 < arguments.value_dim)
            *reinterpret_cast<uint4*>(arguments.out_rows + (target * arguments.value_dim + piece * 8) * 2) = numbers;
    }
}

// Divides by the sums and writes output and log-sum-exp of the 16 queries of a warp.
__device__ __forceinline__ void finish(const Arguments& arguments, const Tile& here, float (&out)[WIDTH / 2],
                                       const Rows& rows, int slot, int warp, int lane) {
    float factor[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
        float sum = rows.sum[u];
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
        // Queries without a key give 0 and -inf.
        const bool empty = sum == 0.0f;
        factor[u] = empty ? 0.0f : 1.0f / sum;
        const float lse = empty ? -INFINITY_ : (rows.base[u] * arguments.scale_log2 + __log2f(sum)) * LN_2;
        const int place = warp * 16 + lane / 4 + 8 * u;
        const int token = PERMUTED ? shared().tokens[slot][place] : here.block * QUERIES + place;
        if (lane % 4 == 0 && token >= 0 && token < arguments.tokens)
            arguments.lse[(static_cast<int64>(here.batch) * arguments.heads + here.head) * arguments.tokens + token] =
                lse;
    }
    const uint32 target = shared_address(memory) + slot * BLOCK_BYTES + warp * 16 * 128;
    const int row = lane % 16;
#pragma unroll
    for (int j = 0; j < WIDTH / 16; j++) {
        const float* x = out + 8 * j;
        matrices_store(target + j / 4 * HALF_BYTES + row * 128 + ((j % 4 * 2 + lane / 16) ^ row % 8) * 16,
                       pack(x[0] * factor[0], x[1] * factor[0]), pack(x[2] * factor[1], x[3] * factor[1]),
                       pack(x[4] * factor[0], x[5] * factor[0]), pack(x[6] * factor[1], x[7] * factor[1]));
    }
    if (PERMUTED) {
        __syncwarp();
        scatter(arguments, here, target, shared().tokens[slot] + warp * 16, lane);
    } else {
        fence_async_shared();
        __syncwarp();
        if (lane == 0) {
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                bulk_store(&arguments.out, target + half * HALF_BYTES, half * 64,
                           here.block * QUERIES + warp * 16, here.head, here.batch);
            bulk_commit();
        }
    }
}

// Group `group` of the consumers: its 64 queries of each tile.
__device__ __forceinline__ void consume(const Arguments& arguments, int group, int lane) {
    const int warp = group * 4 + threadIdx.x / 32 % 4;
    const float scale_log2 = arguments.scale_log2;
    Place place = {0, 0};
    for (uint32 round = 0;; round++) {
        const int slot = round % SLOTS;
        const uint32 phase = round / SLOTS & 1;
        const Tile& here = await_tile(slot, phase);
        const int whole = here.whole, real = here.real;
        if (real < 0) break;
        mbarrier_wait(shared_address(&shared().query_ready[slot]), phase);
        const uint64 query = operand(shared_address(memory) + slot * BLOCK_BYTES + group * (64 * 128), 0, 1024);
        float score[KEYS / 2], out[WIDTH / 2];
        uint32 weight[KEYS / 4];
        Rows rows = {{-INFINITY_, -INFINITY_}, {0.0f, 0.0f}};
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) out[i] = 0.0f;
        if (real > 0) {
            await(place);
            wgmma_fence();
            start_scores(score, query, place.stage);
            wgmma_wait<0>();
            pin(score);
            const int length = shared().lengths[place.stage];
            __syncwarp();
            give_back(place.stage, lane);
            place.next();
            adjust(score, arguments, here, length, lane);
            largest(score, rows, rows.base);
            weigh<true>(score, rows, scale_log2);
            pack_all(weight, score);
        }
        if (!PERMUTED && round && lane == 0) {
            // The last tile's output has long been read by now: its memory takes the queries of the next tile.
            bulk_wait_read();
            mbarrier_arrive(shared_address(&shared().query_free[slot ^ 1]));
        }
        if (real > 0) {
            int i = 1;
#pragma unroll 1
            for (; i < whole; i++)
                step<false>(score, out, weight, rows, query, place, arguments, here, lane);
#pragma unroll 1
            for (; i < real; i++)
                step<true>(score, out, weight, rows, query, place, arguments, here, lane);
            await(place);
            wgmma_fence();
            start_output(out, weight, place.stage);
            take_output(out, place.stage, lane);
            place.next();
        }
        // The output leaves through the queries' memory, which all warps of the group have read.
        named_sync(1 + group, 128);
        finish(arguments, here, out, rows, slot, warp, lane);
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared().tile_free[slot]));
            if (PERMUTED) mbarrier_arrive(shared_address(&shared().query_free[slot]));
        }
    }
    if (!PERMUTED && lane == 0) bulk_wait_read();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention(const __grid_constant__ Arguments arguments) {
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(shared_address(&shared().ready[i]), 1);
            mbarrier_init(shared_address(&shared().free[i]), CONSUMER_WARPS);
        }
        for (int i = 0; i < SLOTS; i++) {
            mbarrier_init(shared_address(&shared().query_ready[i]), PERMUTED ? 32 * GATHER_WARPS : 1);
            mbarrier_init(shared_address(&shared().query_free[i]), CONSUMER_WARPS);
            mbarrier_init(shared_address(&shared().tile_ready[i]), 1);
            mbarrier_init(shared_address(&shared().tile_free[i]),
                          CONSUMER_WARPS + 1 + TWO_PRODUCERS + (PERMUTED ? GATHER_WARPS : 0));
        }
        fence_barrier_init();
        prefetch_map(&arguments.key);
        prefetch_map(&arguments.value);
        if (!PERMUTED) {
            prefetch_map(&arguments.query);
            prefetch_map(&arguments.out);
        }
    }
    __syncthreads();
    if (warp < 4) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (warp == 0)
            produce<true, !TWO_PRODUCERS>(arguments, lane);
        else if (warp == 1)
            schedule(arguments, lane);
        else if (TWO_PRODUCERS && warp == 3)
            produce<false>(arguments, lane);
        else if (PERMUTED)
            gather(arguments, warp - 2, lane);
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume(arguments, warp / 4 - 1, lane);
    }
}
