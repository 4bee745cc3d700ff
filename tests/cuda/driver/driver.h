// A CUDA driver on host memory, for tests on machines without a GPU.
//
// Work is queued, and done as late as CUDA allows (when somebody waits for it), at once, or at random moments. Device
// memory is host memory that is poisoned when it is handed out and when it is freed; what a copy or a kernel touches is
// held against the live blocks when it runs, in the stream's order. Kernels do not run: a callback gets their names and
// arguments, and a test puts the reference there. What is wrong without being an error of the API is collected as a
// problem. Rules are those of NVIDIA's "CUDA Driver API" reference; its section is named where a rule is applied.
#pragma once
#include <cuda.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))
#define API EXPORTED CUresult
#define DEVICES 2

typedef struct CUctx_st Context;
typedef struct CUstream_st Stream;
typedef struct CUevent_st Event;
typedef struct CUgraph_st Graph;
typedef struct CUfunc_st Kernel;
typedef struct CUlib_st Library;

enum MemoryKind { DEVICE_MEMORY, PINNED_MEMORY };
typedef struct Block {
    char *base;
    size_t size, room;  // asked for, as the stream has come to it; and reserved: a multiple of 512
    enum MemoryKind kind;
    int device;
    int owned;      // handed out, and not yet given to a free function
    int valid;      // may be touched, by what the streams have done so far
    int free_done;  // the stream has come past the free
    Stream *freed_on;
    struct Block *next;
} Block;

enum OperationKind { COPY, FILL, KERNEL, RECORD, WAIT, HOST, ALLOCATE, FREE, GRAPH };
typedef struct Operation {
    enum OperationKind kind;
    char *to;  // COPY, FILL
    const char *from;
    size_t size;      // bytes of COPY and ALLOCATE, elements of FILL
    int value, unit;  // of FILL; unit: bytes of an element
    Kernel *kernel;
    unsigned grid[3], block[3], shared;
    char *arguments;  // of KERNEL, packed as the cubin says
    Block *memory;    // of ALLOCATE, FREE
    Event *event;     // of RECORD, WAIT
    unsigned long ticket;
    CUhostFn call;
    void *data;
    Graph *graph;
    struct Operation *next;
} Operation;

struct CUstream_st {
    Context *context;
    Operation *first, *last;
    int nonblocking, busy, destroyed, priority;
    Graph *capture;  // what is recorded here, or NULL
    CUstreamCaptureMode mode;
    pthread_t recorder;
    unsigned long long id;
    Stream *next;
};
struct CUctx_st {
    int device, retained;
    Stream legacy, per_thread;  // the default streams
};
struct CUevent_st {
    Context *context;
    unsigned long recorded, done;  // tickets: of the last cuEventRecord, and of the last that the stream came past
    Stream *stream;
    Graph *capture;  // recorded in a capture
};
struct CUgraph_st {
    Operation *first, *last;
    int count, forks, invalid, destroyed;
    Stream *origin;
};
typedef struct { unsigned offset, size; } Parameter;
struct CUfunc_st {
    char name[256];
    Library *library;
    int parameters, bytes;  // how many, and of all of them
    Parameter parameter[128];
    int most_threads, exact_threads, most_dynamic, static_shared;
};
struct CUlib_st {
    uint64_t image;  // FNV-1a of the cubin: tells a test which file it is
    int count;
    Kernel *kernels[64];
};

// control.c
enum Statistic { SYNCHRONISATIONS, ALLOCATIONS, REUSES, PINNED_ALLOCATIONS, COPIES, LAUNCHES, GRAPH_LAUNCHES,
                 STATISTICS };
enum Living { DEVICE_BLOCKS, PINNED_BLOCKS, STREAMS, GRAPHS, DEVICE_BYTES, LIVING };
enum Schedule { LAZY, EAGER, RANDOM };
// launch: grid, block and dynamic shared bytes; layout: offset and size of each of the `count` parameters.
typedef void (*KernelCallback)(uint64_t image, const unsigned *launch, const char *arguments, const unsigned *layout,
                               int count);
extern pthread_mutex_t driver_mutex;
extern pthread_cond_t stream_idle;
extern enum Schedule schedule;
extern unsigned seed;
extern long statistics[STATISTICS];
extern KernelCallback on_kernel;
extern int problem_count;
void problem(const char *format, ...) __attribute__((format(printf, 1, 2)));
int driver_lock(void);
void driver_unlock(const int *unused);
// The first line of a driver function: one at a time. The lock is given up on return, and while callbacks run.
#define LOCKED __attribute__((cleanup(driver_unlock), unused)) int locked = driver_lock()

// devices.c
extern Context contexts[DEVICES];
extern _Thread_local Context *current;
extern int architecture;
void start_devices(void);

// memory.c
long living_blocks(enum MemoryKind kind, int bytes);
Block *block_at(const void *address);
void check_range(const char *what, const void *address, size_t size, int device, int must_be_known);
void poison(Block *block);

// streams.c
extern Stream *streams;
Stream *stream_of(CUstream handle);
void push(Stream *stream, Operation operation);
int step(Stream *stream);
void run_until(Stream *stream, const Event *event, unsigned long ticket);
void drain(Stream *stream);
void drain_context(Context *context);
void take_chance(void);

// graphs.c
extern long living_graphs;
void append(Graph *graph, Operation operation);
CUresult refuse_on_captured(Stream *stream, const char *what);
CUresult refuse_while_recording(const char *what);

// modules.c
void run_kernel(Stream *stream, const Operation *operation);
