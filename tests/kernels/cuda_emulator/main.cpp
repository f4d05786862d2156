// Runs the programs of a launch one after the other, each with all its threads. Macros: SOURCE, KERNEL.
#include SOURCE

__align__(1024) unsigned char memory[SHARED_BYTES];

struct Thread {
    const Arguments* arguments;
    unsigned place;
};

static void* start(void* given) {
    const Thread* thread = static_cast<const Thread*>(given);
    threadIdx.x = thread->place;
    KERNEL(*thread->arguments);
    return nullptr;
}

extern "C" void run(const Arguments* arguments, int programs) {
    gridDim.x = programs;
    pthread_barrier_init(&all_threads, nullptr, THREADS);
    for (auto& barrier : warps) pthread_barrier_init(&barrier, nullptr, 32);
    for (auto& barrier : groups) pthread_barrier_init(&barrier, nullptr, 128);
    for (int program = 0; program < programs; program++) {
        blockIdx.x = program;
        memset(memory, 0xFF, sizeof memory);  // not a number, in every type
        barriers.clear();
        std::fill(std::begin(named_barriers), std::end(named_barriers), Named());
        std::vector<pthread_t> running(THREADS);
        std::vector<Thread> threads(THREADS);
        for (unsigned i = 0; i < THREADS; i++) {
            threads[i] = {arguments, i};
            pthread_create(&running[i], nullptr, start, &threads[i]);
        }
        for (auto& thread : running) pthread_join(thread, nullptr);
    }
}
