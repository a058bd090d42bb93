/* Runs jobs of the C library on the machine it is compiled for; the other end of foreign_library.py.
 *
 * Usage: foreign_library LIBRARY. Reads requests from standard input and answers on standard output, all numbers int64:
 *   in   function, variant, threads, bytes of the job, number of arrays; the job; for every array where the job has its
 *        pointer, its address there, its bytes, and what is in it
 *   out  status, and every array
 * Function 0 has no job and answers with ABI, sizes of the jobs, and, with their lengths, hash and names of the variants.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#include <windows.h>
static void *symbol(void *library, const char *name) { return (void *)GetProcAddress((HMODULE)library, name); }
#else
#include <dlfcn.h>
#define symbol dlsym
#endif

typedef int64_t count_function(void);
typedef const char *text_function(int64_t);
typedef int job_function(const void *, int64_t, int64_t);

static void get(void *to, int64_t bytes) {
    if (fread(to, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(0);
}
static void put(const void *from, int64_t bytes) {
    if (fwrite(from, 1, (size_t)bytes, stdout) != (size_t)bytes) exit(1);
}
static void put_number(int64_t number) { put(&number, sizeof number); }
static void put_text(const char *text) {
    put_number(text ? (int64_t)strlen(text) : 0);
    if (text) put(text, (int64_t)strlen(text));
}

static void describe(void *library) {
    const char *counts[] = {"mm_abi", "mm_scan_job_size", "mm_conv_job_size", "mm_num_variants"};
    int64_t count = 0;
    for (int i = 0; i < 4; i++) put_number(count = ((count_function *)symbol(library, counts[i]))());
    put_text(((text_function *)symbol(library, "mm_source_hash"))(0));
    for (int64_t i = 0; i < count; i++) put_text(((text_function *)symbol(library, "mm_variant_name"))(i));
}

static void run(job_function *function, const int64_t *request) {
    char *job = malloc((size_t)request[3]), **arrays = calloc((size_t)request[4] + 1, sizeof *arrays);
    int64_t *sizes = calloc((size_t)request[4] + 1, sizeof *sizes);
    get(job, request[3]);
    for (int64_t i = 0; i < request[4]; i++) {
        int64_t head[3]; /* where the pointer is, address, bytes */
        get(head, sizeof head);
        char *memory = malloc((size_t)head[2] + 128);
        arrays[i] = memory + (64 - (uintptr_t)memory % 64) + head[1] % 64; /* lies as even as over there */
        sizes[i] = head[2];
        get(arrays[i], sizes[i]);
        memcpy(job + head[0], &arrays[i], sizeof arrays[i]);
    }
    put_number(function(job, request[1], request[2]));
    for (int64_t i = 0; i < request[4]; i++) put(arrays[i], sizes[i]); /* is not freed: the process is short-lived */
}

int main(int count, char **words) {
    const char *functions[] = {"mm_scan_forward", "mm_scan_backward", "mm_conv_forward", "mm_conv_backward"};
    if (count < 2) return 2;
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY);
    void *library = LoadLibraryA(words[1]);
#else
    void *library = dlopen(words[1], RTLD_NOW);
#endif
    if (!library) {
        fprintf(stderr, "%s cannot be loaded\n", words[1]);
        return 2;
    }
    for (;;) {
        int64_t request[5];
        get(request, sizeof request);
        if (request[0])
            run((job_function *)symbol(library, functions[request[0] - 1]), request);
        else
            describe(library);
        fflush(stdout);
    }
}
