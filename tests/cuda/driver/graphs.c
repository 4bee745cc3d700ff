// Stream capture and graphs ("Stream Management": cuStreamBeginCapture; "Graph Management").
#include "driver.h"

static void invalidate(Stream *stream, const char *what) {
    stream->capture->invalid = 1;
    problem("%s while its stream is recorded", what);
}

// What waits for a stream, or allocates in it, ends its recording.
CUresult refuse_on_captured(Stream *stream, const char *what) {
    invalidate(stream, what);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

// Calls that may wait for other streams are unsafe in a thread that records, or in every thread where the mode is
// global (cuThreadExchangeStreamCaptureMode). The reference names cuMemAlloc and no full list: all that allocate,
// free or wait for the host count here.
CUresult refuse_while_recording(const char *what) {
    for (Stream *stream = streams; stream; stream = stream->next) {
        if (!stream->capture || stream->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
        int here = stream->mode == CU_STREAM_CAPTURE_MODE_GLOBAL || pthread_equal(stream->recorder, pthread_self());
        if (here) return refuse_on_captured(stream, what);
    }
    return CUDA_SUCCESS;
}

void append(Graph *graph, Operation operation) {
    Operation *node = malloc(sizeof *node);
    *node = operation;
    node->next = NULL;
    if (graph->last) graph->last->next = node;
    else graph->first = node;
    graph->last = node;
    graph->count++;
}

API cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream == &stream->context->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    stream->capture = calloc(1, sizeof *stream->capture);
    stream->capture->origin = stream;
    stream->mode = mode;
    stream->recorder = pthread_self();
    return CUDA_SUCCESS;
}

API cuStreamEndCapture(CUstream handle, CUgraph *graph) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (graph) *graph = NULL;
    if (!stream || !stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    Graph *made = stream->capture;
    if (stream->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(stream->recorder, pthread_self())) {
        problem("a recording is ended by another thread than began it");
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    }
    for (Stream *other = streams; other; other = other->next)
        if (other->capture == made) other->capture = NULL;
    if (made->forks) {
        problem("a recording ends with %d streams that were not joined", made->forks);
        return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    }
    if (made->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (graph) *graph = made;
    return CUDA_SUCCESS;
}

// A stream that waits for an event of a recording joins it, until the origin waits for the stream's own event.
static void join(Stream *stream, const Event *event) {
    if (!stream->capture) {
        stream->capture = event->capture;
        stream->mode = event->stream->mode;
        stream->recorder = pthread_self();
        stream->capture->forks++;
    } else if (stream == stream->capture->origin && event->stream != stream && event->stream->capture) {
        event->stream->capture = NULL;
        stream->capture->forks--;
    }
}

API cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    (void)flags;
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->destroyed) return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture) {
        join(stream, event);
        return CUDA_SUCCESS;
    }
    if (stream->capture) {
        invalidate(stream, "waiting for an event from outside");
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (event->recorded) push(stream, (Operation){.kind = WAIT, .event = event, .ticket = event->recorded});
    return CUDA_SUCCESS;
}

static CUstreamCaptureStatus status_of(const Stream *stream) {
    if (!stream || !stream->capture) return CU_STREAM_CAPTURE_STATUS_NONE;
    return stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    LOCKED;
    *status = status_of(stream_of(handle));
    return CUDA_SUCCESS;
}

API cuStreamGetCaptureInfo_v3(CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
                              const CUgraphNode **nodes, const CUgraphEdgeData **edges, size_t *count) {
    LOCKED;
    Stream *stream = stream_of(handle);
    *status = status_of(stream);
    if (id) *id = 1;
    if (graph) *graph = stream ? stream->capture : NULL;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return CUDA_SUCCESS;
}

API cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
                              const CUgraphNode **nodes, size_t *count) {
    return cuStreamGetCaptureInfo_v3(handle, status, id, graph, nodes, NULL, count);
}

API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    (void)mode;
    return CUDA_SUCCESS;
}

long living_graphs;  // executable ones

static CUresult instantiate(CUgraphExec *executable, const Graph *graph) {
    Graph *made = calloc(1, sizeof *made);
    for (const Operation *node = graph->first; node; node = node->next) append(made, *node);
    *executable = (CUgraphExec)made;
    living_graphs++;
    return CUDA_SUCCESS;
}

API cuGraphInstantiateWithParams(CUgraphExec *executable, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *given) {
    LOCKED;
    given->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
    given->hErrNode_out = NULL;
    return instantiate(executable, graph);
}

API cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
    (void)flags;
    LOCKED;
    return instantiate(executable, graph);
}

API cuGraphUpload(CUgraphExec executable, CUstream stream) {
    (void)executable, (void)stream;
    return CUDA_SUCCESS;
}

API cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    Graph *graph = (Graph *)executable;
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (graph->destroyed) {
        problem("cuGraphLaunch of a destroyed graph");
        return CUDA_ERROR_INVALID_VALUE;
    }
    statistics[GRAPH_LAUNCHES]++;
    push(stream, (Operation){.kind = GRAPH, .graph = graph});
    return CUDA_SUCCESS;
}

API cuGraphExecDestroy(CUgraphExec executable) {  // a launch that is on its way still ends
    living_graphs -= !((Graph *)executable)->destroyed;
    ((Graph *)executable)->destroyed = 1;
    return CUDA_SUCCESS;
}

API cuGraphDestroy(CUgraph graph) {
    graph->destroyed = 1;
    return CUDA_SUCCESS;
}

API cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *count) {
    (void)nodes;
    *count = (size_t)graph->count;
    return CUDA_SUCCESS;
}

API cuUserObjectCreate(CUuserObject *object, void *data, CUhostFn destroy, unsigned count, unsigned flags) {
    (void)data, (void)destroy, (void)count, (void)flags;
    *object = calloc(1, 8);
    return CUDA_SUCCESS;
}

API cuUserObjectRelease(CUuserObject object, unsigned count) {
    (void)object, (void)count;
    return CUDA_SUCCESS;
}

API cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned count, unsigned flags) {
    (void)graph, (void)object, (void)count, (void)flags;
    return CUDA_SUCCESS;
}

API cuGraphReleaseUserObject(CUgraph graph, CUuserObject object, unsigned count) {
    (void)graph, (void)object, (void)count;
    return CUDA_SUCCESS;
}
