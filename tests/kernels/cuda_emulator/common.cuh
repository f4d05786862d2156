// Stands for kernels/cuda/common.cuh on a CPU: one thread of the operating system per GPU thread, every lane at its own
// pace. Copies and products are done when they are started, so that what is read too early is found (by a barrier that
// is not passed yet), what is overwritten too early only as far as lanes run apart.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

using int32 = int;
using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using std::max;
using std::min;

// Written by the test: address, 4 sizes, 3 strides in bytes, 4 sizes of a box, bytes of an element.
struct alignas(64) TensorMap {
    uint64 words[16];
};

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __log2f(x) log2f(x)

struct Place3 {
    unsigned x = 0;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline thread_local Place3 threadIdx;
inline Place3 blockIdx, gridDim;
extern __align__(1024) unsigned char memory[];

inline int warp_index() { return threadIdx.x / 32; }
inline int lane_index() { return threadIdx.x % 32; }
inline uint32 shared_address(const void* p) { return (uint32)((const unsigned char*)p - memory); }

// ---- Barriers
struct Barrier {
    uint32 count = 0, pending = 0;
    long bytes = 0;
    uint64 phase = 0;
};
struct Named {
    int arrived = 0;
    uint64 phase = 0;
};
inline std::mutex lock;
inline std::condition_variable changed;
inline std::map<uint32, Barrier> barriers;
inline Named named_barriers[16];
inline pthread_barrier_t all_threads, warps[12], groups[3];

inline void settle(Barrier& b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.count;
    changed.notify_all();
}
inline void arrive(uint32 at, long bytes) {
    std::lock_guard<std::mutex> held(lock);
    Barrier& b = barriers.at(at);
    if (!b.pending) {
        fprintf(stderr, "barrier %u: more arrivals than it counts\n", at);
        abort();
    }
    b.bytes += bytes;
    b.pending--;
    settle(b);
}
inline void mbarrier_init(uint32 at, uint32 count) { barriers[at] = {count, count, 0, 0}; }
inline void fence_barrier_init() {}
inline void mbarrier_arrive(uint32 at) { arrive(at, 0); }
inline void mbarrier_expect(uint32 at, uint32 bytes) { arrive(at, bytes); }
inline void mbarrier_wait(uint32 at, uint32 parity) {
    std::unique_lock<std::mutex> held(lock);
    Barrier& b = barriers.at(at);
    if (!changed.wait_for(held, std::chrono::seconds(60), [&] { return (b.phase & 1) != parity; })) {
        fprintf(stderr, "thread %u waits for ever at barrier %u\n", threadIdx.x, at);
        abort();
    }
}
inline void named_sync(int id, int threads) {
    std::unique_lock<std::mutex> held(lock);
    Named& b = named_barriers[id];
    const uint64 phase = b.phase;
    if (++b.arrived == threads) {
        b.arrived = 0;
        b.phase++;
        changed.notify_all();
    } else {
        changed.wait(held, [&] { return b.phase != phase; });
    }
}
inline void __syncthreads() { pthread_barrier_wait(&all_threads); }
inline void __syncwarp() { pthread_barrier_wait(&warps[warp_index()]); }

// ---- Words of CUDA
inline uint64 exchanged[12][32];
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    T found;
    memcpy(&exchanged[warp_index()][lane_index()], &value, sizeof(T));
    __syncwarp();
    memcpy(&found, &exchanged[warp_index()][from], sizeof(T));
    __syncwarp();
    return found;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, lane_index() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, bool mine) {
    unsigned found = 0;
    for (int lane = 0; lane < 32; lane++) found |= static_cast<unsigned>(__shfl_sync(mask, mine, lane)) << lane;
    return found;
}
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned atomicOr(unsigned* p, unsigned n) { return __atomic_fetch_or(p, n, __ATOMIC_SEQ_CST); }
inline int atomicAdd(int* p, int n) { return __atomic_fetch_add(p, n, __ATOMIC_SEQ_CST); }
inline float __int_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// ---- Copies
// Byte `offset` of a tile: 16-byte piece c of row r lies at c ^ (r % 8).
inline uint32 swizzled(uint32 tile, uint32 offset) { return (tile + offset) ^ (((tile + offset) >> 7 & 7) << 4); }
inline void copy_box(const TensorMap* map, uint32 tile, const int (&corner)[4], bool load) {
    const int64* w = (const int64*)map->words;
    const int size = w[12];
    for (int row = 0; row < w[9]; row++)
        for (int i = 0; i < w[8]; i++) {
            const int64 place[4] = {corner[0] + i, corner[1] + row, corner[2], corner[3]};
            bool inside = true;
            for (int c = 0; c < 4; c++) inside = inside && place[c] >= 0 && place[c] < w[1 + c];
            unsigned char* near = memory + swizzled(tile, row * 128 + i * size);
            char* far = (char*)w[0] + place[0] * size + place[1] * w[5] + place[2] * w[6] + place[3] * w[7];
            if (inside)
                memcpy(load ? (void*)near : far, load ? far : (const void*)near, size);
            else if (load)
                memset(near, 0, size);
        }
}
inline void fence_async_shared() {}
inline void prefetch_map(const TensorMap*) {}
inline void bulk_load(uint32 tile, const TensorMap* map, uint32 barrier, int c0, int c1, int c2, int c3) {
    copy_box(map, tile, {c0, c1, c2, c3}, true);
    std::lock_guard<std::mutex> held(lock);
    barriers.at(barrier).bytes -= map->words[8] * map->words[9] * map->words[12];
    settle(barriers.at(barrier));
}
inline void bulk_store(const TensorMap* map, uint32 tile, int c0, int c1, int c2, int c3) {
    copy_box(map, tile, {c0, c1, c2, c3}, false);
}
inline void bulk_commit() {}
inline void bulk_wait_read() {}
inline void copy_16(uint32 target, const void* source, int bytes) {
    memset(memory + target, 0, 16);
    memcpy(memory + target, source, bytes);
}
inline void copy_wait() {}
inline uint4 load_16(uint32 source) {
    uint4 x;
    memcpy(&x, memory + source, 16);
    return x;
}

// ---- Numbers
#ifdef FP16
inline float number(unsigned short bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return (float)x;
}
inline uint32 rounded(float x) {
    const _Float16 y = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &y, 2);
    return bits;
}
#else
inline float number(unsigned short bits) { return __int_as_float((unsigned)bits << 16); }
inline uint32 rounded(float x) {
    uint32 bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
#endif
inline uint32 pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float from_8(unsigned char bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 127) == 127) return NAN;
    const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return bits & 128 ? -size : size;
}
inline uint32 to_8(float x) {
    if (x != x) return 0x7F;
    const float size = std::min(std::fabs(x), 448.0f);
    const int step = std::max(size ? std::ilogb(size) : -6, -6) - 3;  // the power of two between neighbours
    const int steps = (int)std::nearbyint(ldexpf(size, -step));       // of two as near, the even one
    return (x < 0 ? 128 : 0) | (steps < 8 ? steps : (step + 9) * 8 + steps);
}
inline uint32 pack_8(float a, float b, float c, float d) {
    return to_8(a) | to_8(b) << 8 | to_8(c) << 16 | to_8(d) << 24;
}

// ---- Products, by the layouts of the PTX manual
inline const uint32* registers[3][128];
inline uint64 operand(uint32 address, uint32 lead, uint32 stride) {
    return (address & 0x3FFFF) >> 4 | (uint64)(lead >> 4) << 16 | (uint64)(stride >> 4) << 32;
}
inline uint32 field(uint64 x, int bit) { return (uint32)(x >> bit & 0x3FFF) << 4; }
inline float in_memory(uint32 address) {
    unsigned short bits;
    memcpy(&bits, memory + address, 2);
    return number(bits);
}
// Rows along the other matrix's columns, and rows along k.
inline float by_row(uint64 x, int row, int k) {
    return in_memory(swizzled(field(x, 0) + row / 8 * field(x, 32), row % 8 * 128 + k * 2));
}
inline float by_k(uint64 x, int column, int k) {
    return in_memory(
        swizzled(field(x, 0) + column / 64 * field(x, 16) + k / 8 * field(x, 32), k % 8 * 128 + column % 64 * 2));
}
inline float by_lane(int row, int k) {
    const uint32* a = registers[threadIdx.x / 128][row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
    return number(a[row % 16 / 8 + k / 8 * 2] >> k % 2 * 16);
}
// 8-bit numbers, rows along the other matrix's columns.
inline float by_row_8(uint64 x, int row, int k) {
    return from_8(memory[swizzled(field(x, 0) + row / 8 * field(x, 32), row % 8 * 128 + k)]);
}
inline int32 by_row_integer(uint64 x, int row, int k) {
    return (signed char)memory[swizzled(field(x, 0) + row / 8 * field(x, 32), row % 8 * 128 + k)];
}
inline float by_lane_8(int row, int k) {
    const uint32* a = registers[threadIdx.x / 128][row / 16 * 32 + row % 8 * 4 + k % 16 / 4];
    return from_8(a[row % 16 / 8 + k / 16 * 2] >> k % 4 * 8);
}
template <int K = 16, class T, int N, class A, class B>
void product(T (&d)[N], A a, B b, int add) {
    const int warp = threadIdx.x % 128 / 32, lane = lane_index();
    pthread_barrier_wait(&groups[threadIdx.x / 128]);
    for (int i = 0; i < N; i++) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        T sum = add ? d[i] : 0;
        for (int k = 0; k < K; k++) sum += a(row, k) * b(column, k);
        d[i] = sum;
    }
    pthread_barrier_wait(&groups[threadIdx.x / 128]);
}
template <int N>
void wgmma_shared(float (&d)[N], uint64 a, uint64 b, int add) {
    product(d, [=](int row, int k) { return by_row(a, row, k); }, [=](int n, int k) { return by_row(b, n, k); }, add);
}
template <int N>
void wgmma_transposed(float (&d)[N], const uint32* a, uint64 b, int add) {
    registers[threadIdx.x / 128][threadIdx.x % 128] = a;
    product(d, by_lane, [=](int n, int k) { return by_k(b, n, k); }, add);
}
inline void wgmma_shared_8(float (&d)[64], uint64 a, uint64 b, int add) {
    product<32>(d, [=](int row, int k) { return by_row_8(a, row, k); },
                [=](int n, int k) { return by_row_8(b, n, k); }, add);
}
inline void wgmma_shared_8(int32 (&d)[64], uint64 a, uint64 b, int add) {
    product<32>(d, [=](int row, int k) { return by_row_integer(a, row, k); },
                [=](int n, int k) { return by_row_integer(b, n, k); }, add);
}
inline void wgmma_registers_8(float (&d)[64], const uint32* a, uint64 b, int add) {
    registers[threadIdx.x / 128][threadIdx.x % 128] = a;
    product<32>(d, by_lane_8, [=](int n, int k) { return by_row_8(b, n, k); }, add);
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N>
void wgmma_wait() {}
template <class T>
void pin(T&) {}
template <int N>
void fewer_registers() {}
template <int N>
void more_registers() {}

inline uint32 addresses[12][32];
inline void matrices_store(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    const uint32 x[4] = {a, b, c, d};
    addresses[warp_index()][lane_index()] = address;
    __syncwarp();
    for (int i = 0; i < 4; i++)
        memcpy(memory + addresses[warp_index()][8 * i + lane_index() / 4] + lane_index() % 4 * 4, x + i, 4);
    __syncwarp();
}
