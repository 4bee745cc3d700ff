// Device and pinned memory. Stream-ordered allocation is the section "Stream Ordered Memory Allocator".
#include "driver.h"

struct CUmemPoolHandle_st { cuuint64_t threshold; };
static struct CUmemPoolHandle_st pools[DEVICES];
static Block *blocks;

Block *block_at(const void *address) {
    for (Block *block = blocks; block; block = block->next)
        if ((const char *)address >= block->base && (const char *)address < block->base + block->room) return block;
    return NULL;
}

// How many blocks nobody has freed, or their bytes.
long living_blocks(enum MemoryKind kind, int bytes) {
    long sum = 0;
    for (Block *block = blocks; block; block = block->next)
        if (block->kind == kind && block->owned) sum += bytes ? (long)block->size : 1;
    return sum;
}

void poison(Block *block) { memset(block->base, 0xFF, block->room); }  // floats read it as NaN

// Held against the live blocks at the moment when a stream comes to it. device: of the stream, -1 for none.
void check_range(const char *what, const void *address, size_t size, int device, int must_be_known) {
    const Block *block = block_at(address);
    if (!block) {
        if (must_be_known) problem("%s touches %p, which is in no block", what, address);
        return;
    }
    size_t end = (size_t)((const char *)address - block->base) + size;
    if (!block->valid)
        problem("%s touches %p in a block that is freed, or not allocated yet, in the stream's order", what, address);
    else if (end > block->size)
        problem("%s touches %zu bytes at %p, %zu past the block's end", what, size, address, end - block->size);
    else if (block->kind == DEVICE_MEMORY && device >= 0 && block->device != device)
        problem("%s on device %d touches %p of device %d", what, device, address, block->device);
}

static Block *new_block(size_t size, enum MemoryKind kind, int device) {
    Block *block = calloc(1, sizeof *block);
    block->size = size;
    block->room = (size + 511) / 512 * 512;  // cuMemAlloc aligns to 256 at least
    block->kind = kind;
    block->device = device;
    block->owned = 1;
    block->base = aligned_alloc(512, block->room ? block->room : 512);
    poison(block);
    block->next = blocks;
    blocks = block;
    return block;
}

// Memory that was freed may be handed out again to the stream that freed it, in its order, and to another one when the
// free has been executed (CUmemPool_attribute: reuse by followed dependencies and opportunistic reuse).
static Block *reusable(size_t size, Stream *stream) {
    for (Block *block = blocks; block; block = block->next) {
        int fits = block->room >= size && block->room <= 2 * size + 4096;
        int given = block->kind == DEVICE_MEMORY && !block->owned && block->device == stream->context->device;
        if (given && fits && (block->free_done || block->freed_on == stream)) return block;
    }
    return NULL;
}

static CUresult allocate(CUdeviceptr *address, size_t size, CUstream handle, int device) {
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->capture) return refuse_on_captured(stream, "cuMemAllocAsync");  // this driver has no memory nodes
    if (device != stream->context->device) problem("memory of device %d in the order of another's stream", device);
    Block *block = reusable(size, stream);
    statistics[block ? REUSES : ALLOCATIONS]++;
    if (!block) block = new_block(size, DEVICE_MEMORY, device);
    block->owned = 1;
    push(stream, (Operation){.kind = ALLOCATE, .memory = block, .size = size});
    *address = (CUdeviceptr)block->base;
    return CUDA_SUCCESS;
}

API cuMemAllocAsync(CUdeviceptr *address, size_t size, CUstream handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    return allocate(address, size, handle, stream ? stream->context->device : 0);
}

API cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t size, CUmemoryPool pool, CUstream handle) {
    LOCKED;
    return allocate(address, size, handle, (int)(pool - pools));
}

API cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
    LOCKED;
    Stream *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    Block *block = block_at((void *)address);
    if (stream->destroyed) {
        problem("cuMemFreeAsync on a destroyed stream");
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!block || !block->owned || (char *)address != block->base) {
        problem("cuMemFreeAsync of %p, which is no live block", (void *)address);
        return CUDA_ERROR_INVALID_VALUE;
    }
    // Only what the same graph allocated can be freed in it ("Graph memory nodes").
    if (stream->capture) return refuse_on_captured(stream, "cuMemFreeAsync of memory from outside");
    block->owned = 0;
    block->free_done = 0;
    block->freed_on = stream;
    push(stream, (Operation){.kind = FREE, .memory = block});
    return CUDA_SUCCESS;
}

API cuMemAlloc(CUdeviceptr *address, size_t size) {
    LOCKED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    CUresult refused = refuse_while_recording("cuMemAlloc");
    if (refused) return refused;
    statistics[ALLOCATIONS]++;
    Block *block = new_block(size, DEVICE_MEMORY, current->device);
    block->valid = 1;
    *address = (CUdeviceptr)block->base;
    return CUDA_SUCCESS;
}

static CUresult free_at_once(void *address, enum MemoryKind kind, const char *what) {
    Block *block = block_at(address);
    if (!block || !block->owned || block->kind != kind) {
        problem("%s of %p, which is no live block", what, address);
        return CUDA_ERROR_INVALID_VALUE;
    }
    block->owned = block->valid = 0;
    block->free_done = 1;
    poison(block);
    return CUDA_SUCCESS;
}

API cuMemFree(CUdeviceptr address) {  // waits for all work of the context
    LOCKED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (!address) return CUDA_SUCCESS;
    CUresult refused = refuse_while_recording("cuMemFree");
    if (refused) return refused;
    drain_context(current);
    return free_at_once((void *)address, DEVICE_MEMORY, "cuMemFree");
}

static CUresult allocate_pinned(void **address, size_t size) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    CUresult refused = refuse_while_recording("cuMemAllocHost");
    if (refused) return refused;
    statistics[PINNED_ALLOCATIONS]++;
    Block *block = new_block(size, PINNED_MEMORY, current->device);
    block->valid = 1;
    *address = block->base;
    return CUDA_SUCCESS;
}

API cuMemAllocHost(void **address, size_t size) {
    LOCKED;
    return allocate_pinned(address, size);
}

API cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    (void)flags;
    LOCKED;
    return allocate_pinned(address, size);
}

API cuMemFreeHost(void *address) {  // nothing promises that it waits for copies: here it does not
    LOCKED;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    CUresult refused = refuse_while_recording("cuMemFreeHost");
    return refused ? refused : free_at_once(address, PINNED_MEMORY, "cuMemFreeHost");
}

static CUresult pointer_attribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    const Block *block = block_at((void *)address);
    switch ((int)attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        if (!block) return CUDA_ERROR_INVALID_VALUE;
        *(unsigned *)value = block->kind == DEVICE_MEMORY ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(int *)value = 0; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = block ? block->device : -2; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = address; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(void **)value = (void *)address; return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}

API cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    LOCKED;
    return pointer_attribute(value, attribute, address);
}

API cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr address) {
    LOCKED;
    for (unsigned i = 0; i < count; i++)
        if (pointer_attribute(values[i], attributes[i], address)) memset(values[i], 0, 4);
    return CUDA_SUCCESS;
}

API cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) {
    *pool = &pools[device];
    return CUDA_SUCCESS;
}

API cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }

API cuMemGetMemPool(CUmemoryPool *pool, CUmemLocation *location, CUmemAllocationType type) {  // CUDA 13
    (void)type;
    return cuDeviceGetDefaultMemPool(pool, location->id);
}

API cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    int reuse = attribute <= CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES;  // the first three are switches
    if (reuse) *(int *)value = 1;
    else *(cuuint64_t *)value = attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD ? pool->threshold : 0;
    return CUDA_SUCCESS;
}

API cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    if (attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) pool->threshold = *(cuuint64_t *)value;
    return CUDA_SUCCESS;
}
