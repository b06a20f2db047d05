/* STAND-IN for NVIDIA's libcuda: answers how many GPUs the test host claims. For tests of the path, not of a GPU. */
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

int cuInit(unsigned int flags) { return flags == 0 ? 0 : 1; }

int cuDriverGetVersion(int *version) { *version = 12040; return 0; }

int cuDeviceGetCount(int *count) {
    char text[16] = {0};
    int file = open("/etc/mixtral-run-standin-gpus", O_RDONLY);
    if (file < 0 || read(file, text, sizeof text - 1) <= 0) return 100;
    close(file);
    *count = atoi(text);
    return 0;
}
