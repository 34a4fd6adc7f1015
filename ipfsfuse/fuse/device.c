/* A thread that reads the kernel's requests from /dev/fuse, answers some (opens.c, reads.c) and queues the
 * rest for Python.
 *
 * It is loaded as libfuse_calls.c is. This fuse_session_receive_buf stands before libfuse's and gives
 * pyfuse3 the queued requests. This fuse_session_fd names an eventfd for pyfuse3 to wait on, instead of the
 * device: Python is woken for what it must answer and for nothing else, since a turn of its event loop costs
 * 0.1 ms. Until device_start is called, libfuse reads the device itself, and Python says by the eventfd when
 * there is something to read.
 * Concurrency: one lock for the queue. The thread uses nothing of Python's.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#include "device.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REQUEST (2U << 20)  /* bytes of the largest request: the kernel wants room for a write, 1 MiB (init_patch.py) */
#define QUEUED (1U << 20)   /* bytes of requests that may wait for Python */
#define SPIN_NS 20000       /* who goes through small files is back in 1 to 5 us, and falling asleep costs more */
#define REPLY_WAIT_MS 100   /* for room in a socket that stands in the device's place */
#define MEMORY_TRIES 6      /* after 1, 2, 4, ... ms */

struct request { struct request *next; size_t size; void *bytes; int64_t read_at; };

static struct request *first, **last = &first;
static size_t queued;
static int over;            /* 1 when no more requests come, -errno when reading failed */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t taken = PTHREAD_COND_INITIALIZER;

/* How long the request that pyfuse3 took last had waited for it, in nanoseconds. A handler that has not waited yet is
 * serving that request. */
int64_t device_waited;

static int wakeup_fd = -1, device = -1, stop_fd = -1;
static atomic_int stopping;
static pthread_t thread;
static char *buffer;

static int wait_for_room(int file)
{
	struct pollfd watched[] = {{.fd = file, .events = POLLOUT}, {.fd = stop_fd, .events = POLLIN}};

	return poll(watched, 2, REPLY_WAIT_MS) > 0 && watched[0].revents & POLLOUT;
}

/* What a failed write to the device means is in fs/fuse/dev.c, fuse_dev_do_write. It fails with ENOENT if the
 * request is over. It may fail with ENOMEM before it has looked for the request, which then still waits. Once
 * it has found the request and can't copy the answer, it ends the request with EIO: then another try finds no
 * request. */
enum reply device_reply(int file, uint64_t unique, const void *body, size_t size)
{
	struct fuse_out_header header = {.len = sizeof header + size, .unique = unique};
	struct iovec parts[] = {{&header, sizeof header}, {(void *)body, size}};
	int tries = 0;

	while (writev(file, parts, size ? 2 : 1) < 0)
		switch (errno) {
		case EINTR:
			break;
		case EAGAIN: /* never from /dev/fuse */
			if (!wait_for_room(file))
				return stopping ? REPLY_GONE : REPLY_FAILED;
			break;
		case ENOMEM:
			if (tries == MEMORY_TRIES)
				return REPLY_FAILED;
			usleep(1000U << tries++);
			break;
		case ENOENT: /* the request is over */
		case ENODEV: /* the mount is gone */
		default:     /* the kernel has ended the request with EIO */
			return REPLY_GONE;
		}
	return REPLY_SENT;
}

static void wake(void) { eventfd_write(wakeup_fd, 1); }

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void discard(struct request *one)
{
	if (one)
		free(one->bytes);
	free(one);
}

static struct request *copy_of(const char *bytes, size_t size)
{
	struct request *one = calloc(1, sizeof *one);

	if (!one || !(one->bytes = malloc(size))) {
		discard(one);
		return NULL;
	}
	one->size = size;
	one->read_at = now_ns();
	memcpy(one->bytes, bytes, size);
	return one;
}

static void pass_on(const char *bytes, size_t size)
{
	struct request *one;

	while (!(one = copy_of(bytes, size))) { /* a caller waits for it: it can't be dropped */
		if (stopping)
			return;
		usleep(1000);
	}
	pthread_mutex_lock(&lock);
	while (queued > QUEUED && !over)
		pthread_cond_wait(&taken, &lock);
	if (!first)
		wake();
	*last = one;
	last = &one->next;
	queued += size;
	pthread_mutex_unlock(&lock);
}

static void end_with(int how)
{
	pthread_mutex_lock(&lock);
	over = how;
	wake();
	pthread_mutex_unlock(&lock);
}

/* Reads one request. Returns its size, 0 if no more will come, or -errno. Spins for a moment before it
 * sleeps. */
static ssize_t receive(void)
{
	struct pollfd watched[] = {{.fd = device, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};
	int64_t spin_until = 0;
	ssize_t size;

	for (;;) {
		size = read(device, buffer, REQUEST);
		if (size >= 0 || errno == ENODEV)
			return size > 0 ? size : 0;
		if (errno == EINTR || errno == ENOENT) /* ENOENT: the request was taken back */
			continue;
		if (errno != EAGAIN)
			return -errno;
		if (!spin_until)
			spin_until = now_ns() + SPIN_NS;
		if (now_ns() < spin_until)
			sched_yield();
		else if (poll(watched, 2, -1) > 0 && watched[1].revents)
			return 0;
	}
}

static int answer(const struct fuse_in_header *request, size_t size)
{
	return size >= sizeof *request && (opens_answer(device, request, size) || reads_answer(device, request, size));
}

static void *run(void *unused)
{
	ssize_t size = 0;

	while (!stopping && (size = receive()) > 0)
		if (!answer((const void *)buffer, size))
			pass_on(buffer, size);
	end_with(size < 0 ? (int)size : 1);
	return unused;
}

/* Call this before pyfuse3 is given its device. pyfuse3 will wait on the eventfd `wakeup`. */
void device_init(int wakeup) { wakeup_fd = wakeup; }

/* From now on the thread reads requests from `from`, the device that libfuse has. Returns 0 or errno. */
int device_start(int from)
{
	sigset_t all, before;
	int failed;

	over = stopping = 0;
	stop_fd = eventfd(0, EFD_CLOEXEC);
	if (stop_fd < 0 || fcntl(from, F_SETFL, fcntl(from, F_GETFL) | O_NONBLOCK) < 0)
		return errno;
	buffer = malloc(REQUEST);
	if (!buffer)
		return ENOMEM;
	device = from;
	sigfillset(&all); /* signals are for Python's main thread */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	failed = pthread_create(&thread, NULL, run, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed)
		device = -1;
	return failed;
}

/* Ends the thread. Queued requests are dropped. */
void device_stop(void)
{
	if (device >= 0) {
		stopping = 1;
		eventfd_write(stop_fd, 1);
		pthread_mutex_lock(&lock);
		over = 1;
		pthread_cond_broadcast(&taken);
		pthread_mutex_unlock(&lock);
		pthread_join(thread, NULL);
	}
	while (first) {
		struct request *gone = first;

		first = gone->next;
		discard(gone);
	}
	last = &first;
	queued = 0;
	opens_clear();
	free(buffer);
	buffer = NULL;
	if (stop_fd >= 0)
		close(stop_fd);
	wakeup_fd = device = stop_fd = -1;
}

static struct request *take(int *how)
{
	struct request *one;
	eventfd_t ignored;

	pthread_mutex_lock(&lock);
	one = first;
	*how = over;
	if (one) {
		first = one->next;
		if (!first)
			last = &first;
		queued -= one->size;
		pthread_cond_signal(&taken);
	}
	if (!first && !over)
		eventfd_read(wakeup_fd, &ignored);
	pthread_mutex_unlock(&lock);
	return one;
}

int fuse_session_fd(struct fuse_session *session)
{
	static int (*next)(struct fuse_session *);

	if (!next)
		next = (int (*)(struct fuse_session *))dlsym(RTLD_NEXT, "fuse_session_fd");
	return wakeup_fd >= 0 ? wakeup_fd : next ? next(session) : -1;
}

int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *out)
{
	static int (*next)(struct fuse_session *, struct fuse_buf *);
	struct request *one;
	eventfd_t ignored;
	int how, size;

	if (!next)
		next = (int (*)(struct fuse_session *, struct fuse_buf *))dlsym(RTLD_NEXT, "fuse_session_receive_buf");
	if (device < 0) { /* the session begins */
		if (wakeup_fd >= 0)
			eventfd_read(wakeup_fd, &ignored);
		return next ? next(session, out) : -ENOSYS;
	}
	one = take(&how);
	if (!one && how)
		fuse_session_exit(session);
	if (!one)
		return !how ? -EINTR : how < 0 ? how : 0; /* at EINTR pyfuse3 waits for the next request */
	size = (int)one->size;
	device_waited = now_ns() - one->read_at;
	free(out->mem); /* pyfuse3 frees what we put there in its turn */
	out->mem = one->bytes;
	out->size = one->size;
	out->flags = 0;
	free(one);
	return size;
}
