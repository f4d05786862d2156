// What kernels for compute capability 9.0a share: PTX that CUDA C++ has no words for.
//
// Names follow the PTX manual. Shared memory is addressed by 32-bit numbers (`shared_address`). Tiles in shared memory
// are rows of 128 bytes under the 128-byte swizzle: the 16-byte piece c of row r lies at place c ^ (r % 8) of its row,
// and a tile begins at a multiple of 1,024 bytes.
#pragma once

using int32 = int;
using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;

struct alignas(64) TensorMap {
    uint64 words[16];
};

__device__ __forceinline__ uint32 shared_address(const void* p) {
    return static_cast<uint32>(__cvta_generic_to_shared(p));
}

// ---- Barriers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32 barrier, uint32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After the inits: they must be seen by the copy engine too.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_expect(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over. A fresh barrier counts as one whose phase 1 is over.
__device__ __forceinline__ void mbarrier_wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

// Ordinary stores to shared memory become visible to the copy engine and to the matrix unit.
__device__ __forceinline__ void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor of rank 4 to shared memory; coordinates innermost first.
__device__ __forceinline__ void bulk_load(uint32 target, const TensorMap* map, uint32 barrier, int c0, int c1, int c2,
                                          int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(target), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// A box in shared memory to a tensor of rank 4. Belongs to the thread's group of stores that `bulk_commit` closes.
__device__ __forceinline__ void bulk_store(const TensorMap* map, uint32 source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the stores of this thread have read their shared memory.
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// 16 bytes to shared memory, zeros where `bytes` is 0.
__device__ __forceinline__ void copy_16(uint32 target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ uint4 load_16(uint32 source) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(source) : "memory");
    return x;
}

__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- Matrix products ------------------------------------------------------------------------------------------------

// Operand in shared memory under the 128-byte swizzle. `lead` and `stride` are the byte steps of the manual's "leading"
// and "stride" dimension. Rows along the other matrix's columns ("K-major"): stride = 1,024, from eight rows to the
// next, lead is not used, and a step of 32 bytes along k adds 32 to the address. Rows along k ("MN-major"): lead = from
// 64 columns to the next 64, stride = 1,024, from eight rows of k to the next.
__device__ __forceinline__ uint64 operand(uint32 address, uint32 lead, uint32 stride) {
    return static_cast<uint64>((address & 0x3FFFF) >> 4) | static_cast<uint64>(lead >> 4) << 16 |
           static_cast<uint64>(stride >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most PENDING groups of products are in flight.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving what uses these registers to the other side of a wait.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

template <int N>
__device__ __forceinline__ void pin(int32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

#ifdef FP16
#define ELEMENT "f16"
#else
#define ELEMENT "bf16"
#endif

#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F16(x, i) F4(x, i), F4(x, i + 4), F4(x, i + 8), F4(x, i + 12)
#define I4(x, i) "+r"(x[i]), "+r"(x[i + 1]), "+r"(x[i + 2]), "+r"(x[i + 3])
#define I16(x, i) I4(x, i), I4(x, i + 4), I4(x, i + 8), I4(x, i + 12)
#define REGISTERS_32 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31}"
#define REGISTERS_64 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
    "%57,%58,%59,%60,%61,%62,%63}"

// Thread t of a warpgroup holds of a 64 x N result, in d[4 j + 2 u + v]: row 16 (t / 32) + t % 32 / 4 + 8 u, column
// 8 j + 2 (t % 4) + v. Of a 64 x 16 operand in registers, in 16-bit half v of a[u + 2 w]: the same row, column
// 8 w + 2 (t % 4) + v.

// d (64 x 128) = [d +] a b, both in shared memory and K-major. `add`: 0 overwrites d.
__device__ __forceinline__ void wgmma_shared(float (&d)[64], uint64 a, uint64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT "." ELEMENT " " REGISTERS_64
        ", %64, %65, add, 1, 1, 0, 0;\n}\n"
        : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48) : "l"(a), "l"(b), "r"(add));
}

// d (64 x 128 or 64 x 64) = [d +] a b, a in registers, b in shared memory and MN-major.
__device__ __forceinline__ void wgmma_transposed(float (&d)[64], const uint32* a, uint64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT "." ELEMENT " " REGISTERS_64
        ", {%64,%65,%66,%67}, %68, add, 1, 1, 1;\n}\n"
        : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_transposed(float (&d)[32], const uint32* a, uint64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " REGISTERS_32
        ", {%32,%33,%34,%35}, %36, add, 1, 1, 1;\n}\n"
        : F16(d, 0), F16(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// 8-bit numbers: 32 of them along k, all operands K-major. In registers, byte v of a[u + 2 w] is of the row above and
// column 16 w + 4 (t % 4) + v.

// d (64 x 128) = [d +] a b in e4m3, both in shared memory.
__device__ __forceinline__ void wgmma_shared_8(float (&d)[64], uint64 a, uint64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " REGISTERS_64 ", %64, %65, add, 1, 1;\n}\n"
        : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48) : "l"(a), "l"(b), "r"(add));
}

// The same of signed integers.
__device__ __forceinline__ void wgmma_shared_8(int32 (&d)[64], uint64 a, uint64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " REGISTERS_64 ", %64, %65, add;\n}\n"
        : I16(d, 0), I16(d, 16), I16(d, 32), I16(d, 48) : "l"(a), "l"(b), "r"(add));
}

// d (64 x 128) = [d +] a b in e4m3, a in registers, b in shared memory.
__device__ __forceinline__ void wgmma_registers_8(float (&d)[64], const uint32* a, uint64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " REGISTERS_64
        ", {%64,%65,%66,%67}, %68, add, 1, 1;\n}\n"
        : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// ---- Registers ------------------------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers as 16 bits each, the first in the low half.
__device__ __forceinline__ uint32 pack(float low, float high) {
    uint32 both;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Four numbers in e4m3, the first in the lowest byte; beyond 448 they become 448, NaN stays NaN.
__device__ __forceinline__ uint32 pack_8(float first, float second, float third, float fourth) {
    uint32 word;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}\n"
        : "=r"(word) : "f"(first), "f"(second), "f"(third), "f"(fourth));
    return word;
}

// Four 8 x 8 matrices of 16 bits from registers to rows of 16 bytes; lane l says where row l % 8 of matrix l / 8
// is.
__device__ __forceinline__ void matrices_store(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
