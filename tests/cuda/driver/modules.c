// Cubins: which kernels are in them, how their parameters lie, what a launch may be ("Module Management",
// "Library Management", "Execution Control"; `cuobjdump -elf` shows the same records).
#include "driver.h"
#include <elf.h>
#include <stdio.h>

#define CUBIN_MACHINE 190  // EM_CUDA
// Records of a section .nv.info.KERNEL: a format byte, an attribute byte, 16 bits, and for SIZED that many bytes.
enum { SIZED = 0x04 };
enum { MAX_THREADS = 0x05, REQUIRED_THREADS = 0x10, PARAMETER = 0x17, PARAMETER_BYTES = 0x19 };

static void read_sized(Kernel *kernel, unsigned attribute, const unsigned char *body) {
    uint32_t words[3];
    memcpy(words, body, attribute == PARAMETER || attribute == MAX_THREADS || attribute == REQUIRED_THREADS ? 12 : 0);
    if (attribute == MAX_THREADS) kernel->most_threads = (int)(words[0] * words[1] * words[2]);
    if (attribute == REQUIRED_THREADS) kernel->exact_threads = (int)(words[0] * words[1] * words[2]);
    if (attribute != PARAMETER) return;
    int ordinal = (int)(words[1] & 0xffff);
    if (ordinal >= 128) return;
    kernel->parameter[ordinal] = (Parameter){words[1] >> 16, words[2] >> 18};
    if (ordinal >= kernel->parameters) kernel->parameters = ordinal + 1;
}

static void read_records(Kernel *kernel, const unsigned char *section, size_t size) {
    for (size_t at = 0; at + 4 <= size;) {
        uint16_t half;
        memcpy(&half, section + at + 2, 2);
        unsigned format = section[at], attribute = section[at + 1];
        at += 4;
        if (format == SIZED) {
            read_sized(kernel, attribute, section + at);
            at += half;
        } else if (attribute == PARAMETER_BYTES) {
            kernel->bytes = half;
        }
    }
}

static const char *suffix(const char *name, const char *prefix) {
    size_t size = strlen(prefix);
    return strncmp(name, prefix, size) ? NULL : name + size;
}

static void read_kernel(Kernel *kernel, const char *image, const Elf64_Ehdr *header) {
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    const char *names = image + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++) {
        const char *info = suffix(names + sections[i].sh_name, ".nv.info.");
        const char *shared = suffix(names + sections[i].sh_name, ".nv.shared.");
        const unsigned char *data = (const unsigned char *)image + sections[i].sh_offset;
        if (info && !strcmp(info, kernel->name)) read_records(kernel, data, sections[i].sh_size);
        if (shared && !strcmp(shared, kernel->name)) kernel->static_shared = (int)sections[i].sh_size;
    }
}

// A cubin comes without its size: it ends with its last section or with one of its tables.
static uint64_t digest(const char *image, const Elf64_Ehdr *header) {
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    size_t end = header->e_shoff + (size_t)header->e_shnum * sizeof *sections;
    size_t segments = header->e_phoff + (size_t)header->e_phnum * sizeof(Elf64_Phdr);
    if (header->e_phnum && segments > end) end = segments;
    for (int i = 0; i < header->e_shnum; i++)
        if (sections[i].sh_type != SHT_NOBITS && sections[i].sh_offset + sections[i].sh_size > end)
            end = sections[i].sh_offset + sections[i].sh_size;
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < end; i++) hash = (hash ^ (unsigned char)image[i]) * 0x100000001b3;
    return hash;
}

static CUresult check_architecture(const Elf64_Ehdr *header) {
    if (header->e_machine != CUBIN_MACHINE) return CUDA_ERROR_INVALID_IMAGE;
    int newer = header->e_ident[EI_ABIVERSION] >= 8;
    int built_for = (int)(newer ? (header->e_flags >> 8) & 0xff : header->e_flags & 0xff);
    if (built_for / 10 == architecture / 10 && built_for <= architecture) return CUDA_SUCCESS;
    problem("a cubin for sm_%d on sm_%d", built_for, architecture);
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

static CUresult load(Library **loaded, const char *image) {
    const Elf64_Ehdr *header = (const void *)image;
    if (memcmp(image, ELFMAG, SELFMAG)) {
        problem("an image that is no cubin: there is no compiler here");
        return CUDA_ERROR_INVALID_IMAGE;
    }
    CUresult refused = check_architecture(header);
    if (refused) return refused;
    Library *library = calloc(1, sizeof *library);
    library->image = digest(image, header);
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    const char *names = image + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum && library->count < 64; i++) {
        const char *name = suffix(names + sections[i].sh_name, ".text.");
        if (!name) continue;
        Kernel *kernel = calloc(1, sizeof *kernel);
        snprintf(kernel->name, sizeof kernel->name, "%s", name);
        kernel->library = library;
        kernel->most_dynamic = 49152;  // more must be asked for
        read_kernel(kernel, image, header);
        library->kernels[library->count++] = kernel;
    }
    *loaded = library;
    return CUDA_SUCCESS;
}

API cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *options, void **values, unsigned count,
                      CUlibraryOption *library_options, void **library_values, unsigned library_count) {
    (void)options, (void)values, (void)count, (void)library_options, (void)library_values, (void)library_count;
    LOCKED;
    return load((Library **)library, code);
}

API cuLibraryUnload(CUlibrary library) {  // kept: a launch may be in a queue
    (void)library;
    return CUDA_SUCCESS;
}

API cuLibraryGetKernel(CUkernel *kernel, CUlibrary handle, const char *name) {
    LOCKED;
    Library *library = (Library *)handle;
    for (int i = 0; i < library->count; i++)
        if (!strcmp(library->kernels[i]->name, name)) {
            *kernel = (CUkernel)library->kernels[i];
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_NOT_FOUND;
}

API cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
}

API cuKernelGetLibrary(CUlibrary *library, CUkernel kernel) {
    *library = (CUlibrary)((Kernel *)kernel)->library;
    return CUDA_SUCCESS;
}

API cuModuleGetLoadingMode(CUmoduleLoadingMode *mode) {
    *mode = CU_MODULE_LAZY_LOADING;
    return CUDA_SUCCESS;
}

API cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction kernel) {
    *value = 0;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = kernel->most_threads;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) *value = kernel->most_dynamic;
    if (attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) *value = kernel->static_shared;
    return CUDA_SUCCESS;
}

API cuKernelGetAttribute(int *value, CUfunction_attribute attribute, CUkernel kernel, CUdevice device) {
    (void)device;
    return cuFuncGetAttribute(value, attribute, (CUfunction)kernel);
}

API cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) kernel->most_dynamic = value;
    return CUDA_SUCCESS;
}

API cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
    (void)device;
    return cuFuncSetAttribute((CUfunction)kernel, attribute, value);
}

API cuKernelGetParamInfo(CUkernel handle, size_t index, size_t *offset, size_t *size) {
    const Kernel *kernel = (Kernel *)handle;
    if (index >= (size_t)kernel->parameters) return CUDA_ERROR_INVALID_VALUE;
    if (offset) *offset = kernel->parameter[index].offset;
    if (size) *size = kernel->parameter[index].size;
    return CUDA_SUCCESS;
}

static CUresult check_launch(const Kernel *kernel, const unsigned *grid, const unsigned *block, unsigned shared) {
    unsigned long threads = (unsigned long)block[0] * block[1] * block[2];
    int most = kernel->most_threads ? kernel->most_threads : 1024;
    if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (!threads || threads > (unsigned long)most) return CUDA_ERROR_INVALID_VALUE;
    if (kernel->exact_threads && threads != (unsigned long)kernel->exact_threads) {
        problem("%s wants blocks of %d threads, not %lu", kernel->name, kernel->exact_threads, threads);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if ((int)shared > kernel->most_dynamic) {
        problem("%s: %u bytes of dynamic shared memory, %d allowed", kernel->name, shared, kernel->most_dynamic);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

API cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction kernel, void **arguments, void **extra) {
    (void)extra;
    LOCKED;
    Stream *stream = stream_of(how->hStream);
    if (!stream) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->destroyed) return CUDA_ERROR_INVALID_HANDLE;
    Operation launch = {.kind = KERNEL, .kernel = kernel, .shared = how->sharedMemBytes,
                        .grid = {how->gridDimX, how->gridDimY, how->gridDimZ},
                        .block = {how->blockDimX, how->blockDimY, how->blockDimZ}};
    CUresult refused = check_launch(kernel, launch.grid, launch.block, launch.shared);
    if (refused) return refused;
    launch.arguments = calloc(1, (size_t)kernel->bytes + 8);
    for (int i = 0; i < kernel->parameters; i++) {
        if (!arguments || !arguments[i]) {
            problem("%s: parameter %d is missing", kernel->name, i);
            free(launch.arguments);
            return CUDA_ERROR_INVALID_VALUE;
        }
        memcpy(launch.arguments + kernel->parameter[i].offset, arguments[i], kernel->parameter[i].size);
    }
    statistics[LAUNCHES]++;
    push(stream, launch);
    return CUDA_SUCCESS;
}

API cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, CUstream stream, void **arguments, void **extra) {
    CUlaunchConfig how = {.gridDimX = x, .gridDimY = y, .gridDimZ = z, .blockDimX = block_x, .blockDimY = block_y,
                          .blockDimZ = block_z, .sharedMemBytes = shared, .hStream = stream};
    return cuLaunchKernelEx(&how, kernel, arguments, extra);
}

// A stream has come to a launch. Pointers are the parameters of eight bytes, null or into a live block.
void run_kernel(Stream *stream, const Operation *launch) {
    const Kernel *kernel = launch->kernel;
    unsigned sizes[7] = {launch->grid[0],  launch->grid[1],  launch->grid[2], launch->block[0],
                         launch->block[1], launch->block[2], launch->shared};
    unsigned layout[256];
    for (int i = 0; i < kernel->parameters; i++) {
        Parameter parameter = kernel->parameter[i];
        layout[2 * i] = parameter.offset;
        layout[2 * i + 1] = parameter.size;
        void *pointer = NULL;
        if (parameter.size == 8) memcpy(&pointer, launch->arguments + parameter.offset, 8);
        if (pointer) check_range(kernel->name, pointer, 1, stream->context->device, 1);
    }
    if (!on_kernel) return;
    pthread_mutex_unlock(&driver_mutex);
    on_kernel(kernel->library->image, sizes, launch->arguments, layout, kernel->parameters);
    pthread_mutex_lock(&driver_mutex);
}
