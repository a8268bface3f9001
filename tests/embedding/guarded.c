/* Every buffer between pages that cannot be touched, once at the end of its pages and once at their beginning: whatever
   reads or writes beyond a buffer ends the process.

       guarded NET.weights INPUT.f32 RELEVANCE.f32        writes the relevance of the last explanation */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "net.h"

#define SIZE (NET_CHANNELS * NET_HEIGHT * NET_WIDTH)

static void require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "guarded: %s\n", what);
        exit(1);
    }
}

/* `bytes` that end (or begin) at a page's end; with a multiple of 64 both, where `bytes` is none. */
static void *guarded(size_t bytes, int at_end)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page * page;
    char *memory = mmap(NULL, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(memory != MAP_FAILED && mprotect(memory + page, pages, PROT_READ | PROT_WRITE) == 0, "no memory");
    memset(memory + page, 0xa5, pages); /* what is not written first is noise */
    return memory + page + (at_end ? pages - bytes : 0);
}

static void read_file(const char *path, void *to, size_t bytes)
{
    FILE *file = fopen(path, "rb");
    require(file && fread(to, 1, bytes, file) == bytes && fgetc(file) == EOF, path);
    fclose(file);
}

int main(int count, char **path)
{
    require(count == 4, "usage: guarded WEIGHTS INPUT RELEVANCE");
    float *relevance = NULL;
    for (int at_end = 0; at_end < 2; at_end++) {
        void *weights = guarded(NET_WEIGHTS_BYTES, at_end), *workspace = guarded(NET_WORKSPACE_BYTES, at_end);
        float *input = guarded(4 * SIZE, at_end), *output = guarded(4 * NET_CLASSES, at_end);
        float *absorbed = guarded(4, at_end);
        relevance = guarded(4 * SIZE, at_end);
#ifdef NET_COMPACT_BYTES
        void *compact = guarded(NET_COMPACT_BYTES, at_end);
        read_file(path[1], compact, NET_COMPACT_BYTES);
        require(net_unpack(compact, NET_COMPACT_BYTES, weights, workspace) == 0, "unpack");
#else
        read_file(path[1], weights, NET_WEIGHTS_BYTES);
#endif
        require(net_check_weights(weights, NET_WEIGHTS_BYTES) == 0, "check_weights");
        const int sides[][2] = {{1, 1}, {3, 500}, {NET_HEIGHT, NET_WIDTH}, {601, 2}, {97, 211}};
        for (size_t i = 0; i < sizeof sides / sizeof *sides; i++) {
            const int row = 3 * sides[i][1] + (int)i; /* rows that are longer than their pixels; the last row is not */
            unsigned char *pixels = guarded((size_t)row * (sides[i][0] - 1) + 3 * sides[i][1], at_end);
            require(net_preprocess_rgb(pixels, sides[i][0], sides[i][1], row, input) == 0, "preprocess");
        }
        read_file(path[2], input, 4 * SIZE);
        require(net_predict(weights, input, output, workspace) == 0, "predict");
        require(net_explain(weights, input, 0, NULL, relevance, NULL, workspace) == 0, "explain");
        memset(workspace, 0x5a, NET_WORKSPACE_BYTES);
        require(net_explain(weights, input, -1, output, relevance, absorbed, workspace) == 0, "explain");
    }
    FILE *file = fopen(path[3], "wb");
    require(file && fwrite(relevance, 4, SIZE, file) == SIZE && fclose(file) == 0, path[3]);
    return 0;
}
