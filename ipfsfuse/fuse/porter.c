/* The porter: reads the kernel's requests in a thread of its own, answers what needs nobody, and passes the rest on.
 *
 * Loaded as kept_listings.c is, this fuse_session_receive_buf stands in front of libfuse's and gives pyfuse3 what was passed on;
 * fuse_session_fd names what rings then, instead of the device. So Python is woken by what it is needed for, and by nothing else:
 * a turn of its event loop costs 0.1 ms. Until he stands at the door libfuse reads as ever, and whoever has something for it rings.
 * Concurrency: one lock for what is passed on. The thread knows nothing of Python.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#include "porter.h"

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

#define REQUEST (2U << 20)       /* bytes of the largest request: the kernel wants room for a write, which may have 1 MiB (wire.py) */
#define WAITING (1U << 20)       /* bytes of requests that may wait for Python */
#define PATIENCE 20000           /* nanoseconds: who goes through small files is back in 1 to 5 us, and falling asleep costs more */

struct request { struct request *next; size_t size; void *bytes; };

static struct request *first, **last = &first;
static size_t waiting;
static int over;                 /* 1 once the device has no more, -errno where it failed */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t taken = PTHREAD_COND_INITIALIZER;

static int bell = -1, device = -1, stop = -1;
static atomic_int leaving;
static pthread_t thread;
static char *room;

int porter_reply(int device, uint64_t unique, const void *body, size_t size)
{
	struct fuse_out_header header = {.len = sizeof header + size, .unique = unique};
	struct iovec parts[] = {{&header, sizeof header}, {(void *)body, size}};

	return writev(device, parts, size ? 2 : 1) < 0 ? errno : 0;
}

static void ring(void) { eventfd_write(bell, 1); }

static void forget(struct request *one)
{
	if (one)
		free(one->bytes);
	free(one);
}

static struct request *copied(const char *bytes, size_t size)
{
	struct request *one = calloc(1, sizeof *one);

	if (!one || !(one->bytes = malloc(size))) {
		forget(one);
		return NULL;
	}
	one->size = size;
	memcpy(one->bytes, bytes, size);
	return one;
}

static void pass_on(const char *bytes, size_t size)
{
	struct request *one;

	while (!(one = copied(bytes, size))) { /* its caller waits: it can't be dropped */
		if (leaving)
			return;
		usleep(1000);
	}
	pthread_mutex_lock(&lock);
	while (waiting > WAITING && !over)
		pthread_cond_wait(&taken, &lock);
	if (!first)
		ring();
	*last = one;
	last = &one->next;
	waiting += size;
	pthread_mutex_unlock(&lock);
}

static void end_with(int how)
{
	pthread_mutex_lock(&lock);
	over = how;
	ring();
	pthread_mutex_unlock(&lock);
}

static int64_t nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Reads one request: its size, 0 where none comes any more, or -errno. Waits a moment before it falls asleep. */
static ssize_t receive(void)
{
	struct pollfd watched[] = {{.fd = device, .events = POLLIN}, {.fd = stop, .events = POLLIN}};
	int64_t patient_until = 0;
	ssize_t size;

	for (;;) {
		size = read(device, room, REQUEST);
		if (size >= 0 || errno == ENODEV)
			return size > 0 ? size : 0;
		if (errno == EINTR || errno == ENOENT) /* it was taken back meanwhile */
			continue;
		if (errno != EAGAIN)
			return -errno;
		if (!patient_until)
			patient_until = nanoseconds() + PATIENCE;
		if (nanoseconds() < patient_until)
			sched_yield();
		else if (poll(watched, 2, -1) > 0 && watched[1].revents)
			return 0;
	}
}

static int answered(const struct fuse_in_header *request, size_t size)
{
	return size >= sizeof *request && (opens_answered(device, request, size) || reads_answered(device, request, size));
}

static void *stand(void *unused)
{
	ssize_t size = 0;

	while (!leaving && (size = receive()) > 0)
		if (!answered((const void *)room, size))
			pass_on(room, size);
	end_with(size < 0 ? (int)size : 1);
	return unused;
}

/* Before a session begins: `ringing`, an eventfd, is what pyfuse3 shall wait for. */
void porter_hire(int ringing) { bell = ringing; }

/* From now on requests are read from `from`, the device that libfuse has. 0, or errno. */
int porter_begin(int from)
{
	sigset_t all, before;
	int failed;

	over = leaving = 0;
	stop = eventfd(0, EFD_CLOEXEC);
	if (stop < 0 || fcntl(from, F_SETFL, fcntl(from, F_GETFL) | O_NONBLOCK) < 0)
		return errno;
	room = malloc(REQUEST);
	if (!room)
		return ENOMEM;
	device = from;
	sigfillset(&all); /* Python's main thread is to have them */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	failed = pthread_create(&thread, NULL, stand, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed)
		device = -1;
	return failed;
}

/* The porter goes home; what waited is dropped. */
void porter_end(void)
{
	if (device >= 0) {
		leaving = 1;
		eventfd_write(stop, 1);
		pthread_mutex_lock(&lock);
		over = 1;
		pthread_cond_broadcast(&taken);
		pthread_mutex_unlock(&lock);
		pthread_join(thread, NULL);
	}
	while (first) {
		struct request *gone = first;

		first = gone->next;
		forget(gone);
	}
	last = &first;
	waiting = 0;
	free(room);
	room = NULL;
	if (stop >= 0)
		close(stop);
	bell = device = stop = -1;
}

static struct request *take(int *how)
{
	struct request *one;
	eventfd_t rings;

	pthread_mutex_lock(&lock);
	one = first;
	*how = over;
	if (one) {
		first = one->next;
		if (!first)
			last = &first;
		waiting -= one->size;
		pthread_cond_signal(&taken);
	}
	if (!first && !over)
		eventfd_read(bell, &rings);
	pthread_mutex_unlock(&lock);
	return one;
}

int fuse_session_fd(struct fuse_session *session)
{
	static int (*next)(struct fuse_session *);

	if (!next)
		next = (int (*)(struct fuse_session *))dlsym(RTLD_NEXT, "fuse_session_fd");
	return bell >= 0 ? bell : next ? next(session) : -1;
}

int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
	static int (*next)(struct fuse_session *, struct fuse_buf *);
	struct request *one;
	eventfd_t rings;
	int how, size;

	if (!next)
		next = (int (*)(struct fuse_session *, struct fuse_buf *))dlsym(RTLD_NEXT, "fuse_session_receive_buf");
	if (device < 0) { /* the session begins */
		if (bell >= 0)
			eventfd_read(bell, &rings);
		return next ? next(session, buffer) : -ENOSYS;
	}
	one = take(&how);
	if (!one && how)
		fuse_session_exit(session);
	if (!one)
		return !how ? -EINTR : how < 0 ? how : 0; /* at EINTR pyfuse3 waits for the next one */
	size = (int)one->size;
	free(buffer->mem); /* which pyfuse3 frees in the end */
	buffer->mem = one->bytes;
	buffer->size = one->size;
	buffer->flags = 0;
	free(one);
	return size;
}
