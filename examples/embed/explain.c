/* A heatmap of a picture, by a library that fastdtd embed wrote:

       fastdtd embed squeezenet1_1 -o lib --name net
       cc -O2 -Ilib explain.c lib/libnet.a -o explain
       ./explain picture.ppm heatmap.ppm              # binary PPM, as `convert cat.jpg cat.ppm` writes it */
#include <stdio.h>
#include <stdlib.h>

#include "net.h"

static _Alignas(NET_ALIGNMENT) unsigned char workspace[NET_WORKSPACE_BYTES];
static float input[NET_CHANNELS * NET_HEIGHT * NET_WIDTH], relevance[NET_CHANNELS * NET_HEIGHT * NET_WIDTH];
static float scores[NET_CLASSES];

static void require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "explain: %s\n", what);
        exit(1);
    }
}

int main(int count, char **path)
{
    enum { SIZE = NET_HEIGHT * NET_WIDTH };
    int width, height, code, winner = 0;
    require(count == 3, "usage: explain PICTURE.ppm HEATMAP.ppm");
    FILE *file = fopen(path[1], "rb");
    require(file && fscanf(file, "P6 %d %d 255", &width, &height) == 2 && fgetc(file) != EOF, "no binary PPM");
    require(width > 0 && height > 0 && width <= 20000 && height <= 20000, "a side has more than 20,000 pixels");
    unsigned char *pixels = malloc((size_t)width * height * 3);
    require(pixels && fread(pixels, 3, (size_t)width * height, file) == (size_t)width * height, "pixels are missing");
    fclose(file);

    code = net_preprocess_rgb(pixels, height, width, 3 * width, input);
    if (code == 0)
        code = net_explain(NULL, input, -1, scores, relevance, NULL, workspace);
    require(code == 0, net_error(code));
    for (int i = 0; i < NET_CLASSES; i++)
        if (scores[i] > scores[winner])
            winner = i;
    printf("%s, score %.4f\n", net_class_name(winner), scores[winner]);

    float of_pixel[SIZE] = {0}, most = 0; /* summed over channels; white to red, as far as the most relevant pixel */
    for (int i = 0; i < NET_CHANNELS * SIZE; i++)
        of_pixel[i % SIZE] += relevance[i];
    for (int i = 0; i < SIZE; i++)
        most = of_pixel[i] > most ? of_pixel[i] : most;
    require((file = fopen(path[2], "wb")) != NULL, "the heatmap cannot be written");
    fprintf(file, "P6\n%d %d\n255\n", NET_WIDTH, NET_HEIGHT);
    for (int i = 0; i < SIZE; i++) {
        const int pale = 255 - (int)(255 * (most > 0 && of_pixel[i] > 0 ? of_pixel[i] / most : 0));
        const unsigned char colour[3] = {255, (unsigned char)pale, (unsigned char)pale};
        fwrite(colour, 3, 1, file);
    }
    require(fclose(file) == 0, "the heatmap cannot be written");
    return 0;
}
