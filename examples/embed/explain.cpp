// Several pictures at once from C++, a thread and a workspace each; weights in a file:
//
//     fastdtd embed squeezenet1_1 -o lib --name net --weights file
//     c++ -std=c++17 -O2 -Ilib explain.cpp lib/libnet.a -pthread -o explain
//     ./explain lib/net.weights INPUT.f32...         (C, H, W) float32 each, as NAME_preprocess_rgb makes them
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "net.h"

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

static Memory aligned(std::size_t bytes)
{
    return Memory(std::aligned_alloc(NET_ALIGNMENT, (bytes + NET_ALIGNMENT - 1) / NET_ALIGNMENT * NET_ALIGNMENT));
}

static bool read(const char *path, void *to, std::size_t bytes)
{
    std::ifstream file(path, std::ios::binary);
    return static_cast<bool>(file.read(static_cast<char *>(to), static_cast<std::streamsize>(bytes)));
}

static std::string explained(const void *weights, const char *path)
{
    constexpr std::size_t size = NET_CHANNELS * NET_HEIGHT * NET_WIDTH;
    std::vector<float> input(size), relevance(size), scores(NET_CLASSES);
    const Memory workspace = aligned(NET_WORKSPACE_BYTES);
    if (!read(path, input.data(), 4 * size))
        return std::string(path) + " does not hold " + std::to_string(size) + " floats";
    float absorbed = 0;
    if (const int code = net_explain(weights, input.data(), -1, scores.data(), relevance.data(), &absorbed,
                                     workspace.get()))
        return std::string(path) + ": " + net_error(code);
    std::size_t winner = 0;
    for (std::size_t i = 1; i < scores.size(); i++)
        winner = scores[i] > scores[winner] ? i : winner;
    char text[200];
    std::snprintf(text, sizeof text, "%s: class %zu, score %.4f, relevance %.4f, absorbed %.4f", path, winner,
                  scores[winner], std::accumulate(relevance.begin(), relevance.end(), 0.0), absorbed);
    return text;
}

int main(int count, char **path)
{
    const Memory weights = aligned(NET_WEIGHTS_BYTES);
    if (count < 3 || !read(path[1], weights.get(), NET_WEIGHTS_BYTES)
        || net_check_weights(weights.get(), NET_WEIGHTS_BYTES) != NET_OK) {
        std::fprintf(stderr, "usage: explain NET.weights INPUT.f32...\n");
        return 1;
    }
    std::vector<std::string> lines(static_cast<std::size_t>(count) - 2);
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < lines.size(); i++)
        threads.emplace_back([&, i] { lines[i] = explained(weights.get(), path[i + 2]); });
    for (auto &thread : threads)
        thread.join();
    for (const auto &line : lines)
        std::puts(line.c_str());
}
