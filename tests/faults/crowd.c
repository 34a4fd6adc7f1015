/* Many callers at once: each of COUNT threads looks up one of the names FOLDER/s0000, FOLDER/s0001 and so on.
 *
 * usage: crowd FOLDER COUNT
 * Prints "begun" when all threads run. In the end prints the seconds that each call took, and its errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>

static const char *folder;
static pthread_barrier_t barrier;
struct call { pthread_t thread; int number, failed; double seconds; };

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec * 1e-9;
}

static void *look_up(void *of)
{
	struct call *call = of;
	char path[4096];
	struct stat found;
	double began;

	snprintf(path, sizeof path, "%s/s%04d", folder, call->number);
	pthread_barrier_wait(&barrier);
	began = now();
	call->failed = stat(path, &found) ? errno : 0;
	call->seconds = now() - began;
	return NULL;
}

int main(int argc, char **argv)
{
	int count = argc == 3 ? atoi(argv[2]) : 0;
	struct call *calls = calloc(count, sizeof *calls);
	pthread_attr_t small;

	if (!count || !calls)
		return 2;
	folder = argv[1];
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 << 10);
	pthread_barrier_init(&barrier, NULL, count + 1);
	for (int number = 0; number < count; number++) {
		calls[number].number = number;
		if (pthread_create(&calls[number].thread, &small, look_up, &calls[number])) {
			perror("pthread_create");
			return 1;
		}
	}
	pthread_barrier_wait(&barrier);
	puts("begun");
	fflush(stdout);
	for (int number = 0; number < count; number++)
		pthread_join(calls[number].thread, NULL);
	for (int number = 0; number < count; number++)
		printf("%.3f %d\n", calls[number].seconds, calls[number].failed);
	return 0;
}
