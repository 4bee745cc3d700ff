// Streams are queues; events are tickets that a queue comes past ("Stream Management", "Event Management").
#include "driver.h"

Stream *streams;
static unsigned long last_ticket;

// NULL and the two constants mean the default streams of the current context; NULL without one.
Stream *stream_of(CUstream handle) {
    if (handle && handle != CU_STREAM_LEGACY && handle != CU_STREAM_PER_THREAD) return handle;
    if (!current) return NULL;
    return handle == CU_STREAM_PER_THREAD ? &current->per_thread : &current->legacy;
}

static void execute(Stream *stream, Operation *operation) {
    int device = stream->context->device;
    Block *memory = operation->memory;
    switch (operation->kind) {
    case COPY:
        check_range("a copy's source", operation->from, operation->size, device, 0);
        check_range("a copy's target", operation->to, operation->size, device, 0);
        memmove(operation->to, operation->from, operation->size);
        break;
    case FILL:
        check_range("a fill", operation->to, operation->size * (size_t)operation->unit, device, 1);
        for (size_t i = 0; i < operation->size; i++)
            memcpy(operation->to + i * (size_t)operation->unit, &operation->value, (size_t)operation->unit);
        break;
    case KERNEL: run_kernel(stream, operation); break;
    case RECORD:
        if (operation->ticket > operation->event->done) operation->event->done = operation->ticket;
        break;
    case WAIT: run_until(operation->event->stream, operation->event, operation->ticket); break;
    case HOST:
        pthread_mutex_unlock(&driver_mutex);
        operation->call(operation->data);
        pthread_mutex_lock(&driver_mutex);
        break;
    case ALLOCATE:
        memory->valid = 1;
        memory->size = operation->size;
        poison(memory);
        break;
    case FREE:
        memory->valid = 0;
        memory->free_done = 1;
        poison(memory);
        break;
    case GRAPH:
        for (Operation *each = operation->graph->first; each; each = each->next) execute(stream, each);
        break;
    }
}

// Do a stream's next operation; 0 when it has none.
int step(Stream *stream) {
    while (stream->busy) pthread_cond_wait(&stream_idle, &driver_mutex);
    Operation *operation = stream->first;
    if (!operation) return 0;
    stream->first = operation->next;
    if (!stream->first) stream->last = NULL;
    stream->busy = 1;
    execute(stream, operation);
    stream->busy = 0;
    if (operation->kind == KERNEL) free(operation->arguments);
    free(operation);
    pthread_cond_broadcast(&stream_idle);
    return 1;
}

// Until the stream comes past a ticket of the event.
void run_until(Stream *stream, const Event *event, unsigned long ticket) {
    while (event->done < ticket && step(stream)) {}
}

void drain(Stream *stream) {
    while (step(stream)) {}
}

void drain_context(Context *context) {
    drain(&context->legacy);
    drain(&context->per_thread);
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->context == context) drain(stream);
}

// The legacy default stream waits for all blocking streams of its context ("Stream synchronization behavior").
static void drain_blocking(Context *context) {
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->context == context && !stream->nonblocking && !stream->capture) drain(stream);
}

// With a random schedule: some operations of some streams.
void take_chance(void) {
    if (schedule != RANDOM) return;
    int count = 0;
    for (Stream *stream = streams; stream; stream = stream->next) count++;
    while (count && rand_r(&seed) % 3 == 0) {
        int chosen = rand_r(&seed) % count;
        Stream *stream = streams;
        while (chosen--) stream = stream->next;
        if (stream->busy) return;
        step(stream);
    }
}

void push(Stream *stream, Operation operation) {
    if (stream->capture) {
        append(stream->capture, operation);
        return;
    }
    if (stream == &stream->context->legacy) drain_blocking(stream->context);
    Operation *queued = malloc(sizeof *queued);
    *queued = operation;
    queued->next = NULL;
    if (stream->last) stream->last->next = queued;
    else stream->first = queued;
    stream->last = queued;
    if (schedule == EAGER) drain(stream);
    else take_chance();
}

API cuStreamCreateWithPriority(CUstream *handle, unsigned flags, int priority) {
    LOCKED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    static unsigned long long last_id = 10;
    Stream *stream = calloc(1, sizeof *stream);
    stream->context = current;
    stream->priority = priority;
    stream->nonblocking = (flags & CU_STREAM_NON_BLOCKING) != 0;
    stream->id = ++last_id;
    stream->next = streams;
    streams = stream;
    *handle = stream;
    return CUDA_SUCCESS;
}

API cuStreamCreate(CUstream *handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }

API cuStreamDestroy(CUstream stream) {  // work in it goes on; the handle stays readable here
    LOCKED;
    drain(stream);
    stream->destroyed = 1;
    return CUDA_SUCCESS;
}

API cuStreamSynchronize(CUstream handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->destroyed) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture) return refuse_on_captured(stream, "cuStreamSynchronize");
    CUresult refused = refuse_while_recording("cuStreamSynchronize");
    if (refused) return refused;
    statistics[SYNCHRONISATIONS]++;
    if (stream == &stream->context->legacy) drain_blocking(stream->context);
    drain(stream);
    return CUDA_SUCCESS;
}

API cuStreamQuery(CUstream handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->capture) return refuse_on_captured(stream, "cuStreamQuery");
    take_chance();
    return stream->first ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

API cuStreamGetCtx(CUstream handle, CUcontext *context) {
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    *context = stream->context;
    return CUDA_SUCCESS;
}

API cuStreamGetCtx_v2(CUstream handle, CUcontext *context, CUgreenCtx *green) {
    if (green) *green = NULL;
    return cuStreamGetCtx(handle, context);
}

API cuStreamGetDevice(CUstream handle, CUdevice *device) {
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    *device = stream->context->device;
    return CUDA_SUCCESS;
}

API cuStreamGetFlags(CUstream handle, unsigned *flags) {
    Stream *stream = stream_of(handle);
    *flags = stream && stream->nonblocking ? CU_STREAM_NON_BLOCKING : CU_STREAM_DEFAULT;
    return CUDA_SUCCESS;
}

API cuStreamGetPriority(CUstream handle, int *priority) {
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    *priority = stream->priority;
    return CUDA_SUCCESS;
}

API cuStreamGetId(CUstream handle, unsigned long long *id) {
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    *id = stream->id;
    return CUDA_SUCCESS;
}

API cuEventCreate(CUevent *event, unsigned flags) {
    (void)flags;
    LOCKED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    *event = calloc(1, sizeof **event);
    (*event)->context = current;
    return CUDA_SUCCESS;
}

API cuEventDestroy(CUevent event) {  // may be called before it is completed: what waits for it still does
    (void)event;
    return CUDA_SUCCESS;
}

API cuEventRecord(CUevent event, CUstream handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->destroyed) {
        problem("cuEventRecord on a destroyed stream");
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->context != event->context) {  // "hEvent and hStream must be from the same context"
        problem("cuEventRecord of an event of device %d on a stream of device %d", event->context->device,
                stream->context->device);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    event->stream = stream;
    event->capture = stream->capture;
    if (stream->capture) return CUDA_SUCCESS;
    event->recorded = ++last_ticket;
    push(stream, (Operation){.kind = RECORD, .event = event, .ticket = event->recorded});
    return CUDA_SUCCESS;
}

API cuEventRecordWithFlags(CUevent event, CUstream handle, unsigned flags) {
    (void)flags;
    return cuEventRecord(event, handle);
}

API cuEventSynchronize(CUevent event) {
    LOCKED;
    if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
    CUresult refused = refuse_while_recording("cuEventSynchronize");
    if (refused) return refused;
    statistics[SYNCHRONISATIONS]++;
    if (event->recorded) run_until(event->stream, event, event->recorded);
    return CUDA_SUCCESS;
}

API cuEventQuery(CUevent event) {
    LOCKED;
    if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
    CUresult refused = refuse_while_recording("cuEventQuery");
    if (refused) return refused;
    take_chance();
    return event->done >= event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API cuLaunchHostFunc(CUstream handle, CUhostFn call, void *data) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    push(stream, (Operation){.kind = HOST, .call = call, .data = data});
    return CUDA_SUCCESS;
}
