/* MPI_Allreduce(MPI_IN_PLACE, float32, MPI_SUM): time and bus bandwidth per size, one JSON line each from rank 0.
 *
 *   mpicc -O2 -o allreduce_mpi allreduce_mpi.c && mpirun -np 2 ./allreduce_mpi openmpi [LARGEST_BYTES]
 *
 * Two barriers precede each iteration; its time is the maximum over the ranks; the median over iterations is reported.
 * Bus bandwidth = 2(n-1)/n * bytes / time. The last line is 200 tensors of 64 KiB, started one by one, waited for together.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static int ranks, rank;
static const char *label;
static long largest = 268435456L;

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const char *bench, long bytes, int iterations, double *seconds) {
    qsort(seconds, iterations, sizeof *seconds, ascending);
    double median = seconds[iterations / 2];
    if (rank == 0)
        printf("{\"peer\":\"%s\",\"bench\":\"%s\",\"ranks\":%d,\"bytes\":%ld,\"median_us\":%.1f,\"min_us\":%.1f,"
               "\"busbw_gbps\":%.3f}\n",
               label, bench, ranks, bytes, median * 1e6, seconds[0] * 1e6, 2.0 * (ranks - 1) / ranks * bytes / median / 1e9);
    fflush(stdout);
}

static double slowest(double seconds) {
    double most;
    MPI_Allreduce(&seconds, &most, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return most;
}

/* Twice: who was asleep at the first is awake at the second. */
static void wait_for_all(void) {
    MPI_Barrier(MPI_COMM_WORLD);
    MPI_Barrier(MPI_COMM_WORLD);
}

static void fill(float *buffer, long count) {
    for (long i = 0; i < count; i++) buffer[i] = 1.0f;
}

static void check(float got) {
    if (got != (float)ranks) {
        fprintf(stderr, "wrong result on rank %d\n", rank);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
}

static void sizes(void) {
    for (long bytes = 4096; bytes <= largest; bytes *= 4) {
        long count = bytes / 4;
        int warmup = bytes <= 16777216 ? 5 : 2, iterations = bytes <= 1048576 ? 50 : bytes <= 16777216 ? 20 : 7;
        float *buffer = malloc(bytes);
        double *seconds = malloc(iterations * sizeof *seconds);
        for (int k = -warmup; k < iterations; k++) {
            fill(buffer, count);
            wait_for_all();
            double start = MPI_Wtime();
            MPI_Allreduce(MPI_IN_PLACE, buffer, (int)count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
            double most = slowest(MPI_Wtime() - start);
            if (k >= 0) seconds[k] = most;
        }
        check(buffer[0]);
        check(buffer[count - 1]);
        report("allreduce", bytes, iterations, seconds);
        free(buffer);
        free(seconds);
    }
}

static void many_small(void) {
    enum { TENSORS = 200, COUNT = 16384, ITERATIONS = 20, WARMUP = 3 };
    float *tensor[TENSORS];
    MPI_Request request[TENSORS];
    double seconds[ITERATIONS];
    for (int i = 0; i < TENSORS; i++) tensor[i] = malloc(COUNT * sizeof(float));
    for (int k = -WARMUP; k < ITERATIONS; k++) {
        for (int i = 0; i < TENSORS; i++) fill(tensor[i], COUNT);
        wait_for_all();
        double start = MPI_Wtime();
        for (int i = 0; i < TENSORS; i++)
            MPI_Iallreduce(MPI_IN_PLACE, tensor[i], COUNT, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD, &request[i]);
        MPI_Waitall(TENSORS, request, MPI_STATUSES_IGNORE);
        double most = slowest(MPI_Wtime() - start);
        if (k >= 0) seconds[k] = most;
    }
    check(tensor[TENSORS - 1][0]);
    report("fusion_200x64KiB", (long)TENSORS * COUNT * 4, ITERATIONS, seconds);
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    label = argc > 1 ? argv[1] : "mpi";
    if (argc > 2) largest = atol(argv[2]);
    sizes();
    many_small();
    MPI_Finalize();
    return 0;
}
