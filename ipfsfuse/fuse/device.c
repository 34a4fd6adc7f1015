/* A thread that reads the kernel's requests from /dev/fuse, answers some (opens.c, reads.c, pieces.c) and
 * queues the rest for Python.
 *
 * device.py loads this library into the global scope before pyfuse3 is imported. So pyfuse3 calls this
 * fuse_session_mount instead of libfuse's. It starts the thread, and gives libfuse our read and writev
 * (fuse_session_custom_io). libfuse reads from the queue, and is given an eventfd as its device. So pyfuse3
 * is woken only for requests that it must answer: a turn of its event loop costs 0.1 ms.
 *
 * Users take turns (round robin): one request of each user is taken, then the next of each. So thousands of
 * requests of one user delay each request of another by one request only.
 * Concurrency: one lock for all queues. The thread does not use Python.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 314
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define REQUEST (132U << 10) /* bytes of the largest request: libfuse's buffer is larger. See MAX_WRITE in replies.c */
#define QUEUED (16U << 20)   /* bytes of requests that may wait for Python: a lookup has about 100 */
#define FORGETS (1U << 20)   /* bytes of FORGETs among them, for which no process waits */
#define KERNEL UINT32_MAX    /* the user id of FORGETs, which the kernel sends for no user */
#define BUCKETS 4096         /* of the table in which an INTERRUPT finds its request */
#define SPIN_NS 20000        /* a program that reads small files sends its next request after 1 to 5 us; sleeping costs more */

/* From Linux 6.9; headers may be older. */
struct backing_map { int32_t fd; uint32_t flags; uint64_t padding; };
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

struct request {
	struct request *next;    /* the next one of the same user */
	struct request *in_bucket;
	size_t size;
	struct fuse_in_header *bytes;
	int64_t read_at;
	int interrupted;         /* its caller got a signal while it waited */
};
struct user { struct user *next; uint32_t id; struct request *first, **last; };

static struct user *users, **last_user = &users; /* users with requests in the queue, in the order of their turns */
static size_t queued, queued_forgets;            /* bytes of queued requests, and of the FORGETs among them */
static struct request *buckets[BUCKETS];         /* queued requests by number */
static struct { uint64_t *numbers; size_t count, room; } interrupted; /* numbers of requests, for device_interrupted */
static int over;                /* 1 when no more requests come, -errno when reading has failed */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t taken = PTHREAD_COND_INITIALIZER;

/* The number (`unique`) of the request that pyfuse3 took last. A handler that has not awaited yet is serving
 * it. */
uint64_t device_current;

/* How long that request had waited for pyfuse3, in nanoseconds. */
int64_t device_waited;

/* Called with each name that is looked up in the mount's root, before Python gets the request. It must not
 * wait. */
static void (*listener)(void *, const char *, size_t);
static void *listeners_own;

static int start_error;
static int notify_fd = -1, wakeup_fd = -1, device = -1, thread_fd = -1; /* thread_fd wakes the thread */
static atomic_int stopping, retries_reads;
static pthread_t thread;
static char *buffer;

int64_t device_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

void device_notify(void) { eventfd_write(notify_fd, 1); }

static void discard(struct request *one)
{
	if (one)
		free(one->bytes);
	free(one);
}

/* Leaves out the value of a SETXATTR, which is refused in any case: values of up to 64 KiB would soon fill
 * QUEUED. */
static struct request *copy_of(const char *bytes, size_t size, int64_t read_at)
{
	static const size_t longest = sizeof(struct fuse_in_header) + sizeof(struct fuse_setxattr_in) + 256;
	int is_setxattr = ((const struct fuse_in_header *)bytes)->opcode == FUSE_SETXATTR && size > longest;
	struct request *one = calloc(1, sizeof *one);

	if (is_setxattr)
		size = longest; /* the name has 255 bytes at most */
	if (!one || !(one->bytes = malloc(size))) {
		discard(one);
		return NULL;
	}
	one->size = size;
	one->read_at = read_at;
	memcpy(one->bytes, bytes, size);
	if (is_setxattr)
		((struct fuse_setxattr_in *)(one->bytes + 1))->size = 0;
	return one;
}

static uint32_t user_of(const struct request *one)
{
	uint32_t opcode = one->bytes->opcode;

	return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET ? KERNEL : one->bytes->uid;
}

static struct request **bucket_of(uint64_t unique) { return &buckets[unique / 2 % BUCKETS]; } /* they are even */

/* Returns 0 if there is no memory. */
static int append(struct request *one)
{
	uint32_t id = user_of(one);
	struct request **bucket = bucket_of(one->bytes->unique);
	struct user *user = users;

	while (user && user->id != id)
		user = user->next;
	if (!user) {
		if (!(user = calloc(1, sizeof *user)))
			return 0;
		user->id = id;
		user->last = &user->first;
		*last_user = user;
		last_user = &user->next;
	}
	*user->last = one;
	user->last = &one->next;
	one->in_bucket = *bucket;
	*bucket = one;
	queued += one->size;
	queued_forgets += id == KERNEL ? one->size : 0;
	return 1;
}

/* Takes the oldest request of the next user, who then comes last. NULL if there is none. */
static struct request *pop(void)
{
	struct user *user = users;
	struct request *one, **place;

	if (!user)
		return NULL;
	one = user->first;
	for (place = bucket_of(one->bytes->unique); *place != one; place = &(*place)->in_bucket)
		;
	*place = one->in_bucket;
	queued -= one->size;
	queued_forgets -= user->id == KERNEL ? one->size : 0;
	users = user->next;
	if (!users)
		last_user = &users;
	user->next = NULL;
	user->first = one->next;
	if (one->next) {
		*last_user = user;
		last_user = &user->next;
	} else
		free(user);
	return one;
}

/* Tells Python to interrupt the request `unique`, whose handler waits by now. Without memory it is not
 * interrupted, and answered when its handler has what it waits for. */
static void interrupt(uint64_t unique)
{
	size_t room = interrupted.room ? 2 * interrupted.room : 64;
	uint64_t *more;

	if (interrupted.count == interrupted.room) {
		if (!(more = realloc(interrupted.numbers, room * sizeof *more)))
			return;
		interrupted.numbers = more;
		interrupted.room = room;
	}
	interrupted.numbers[interrupted.count++] = unique;
	device_notify();
}

/* The caller of a request got a signal. A request that is still queued is interrupted after it has been
 * taken. */
static void note_interrupt(const char *bytes, size_t size)
{
	const struct fuse_interrupt_in *what = (const void *)(bytes + sizeof(struct fuse_in_header));
	struct request *one;

	if (size < sizeof(struct fuse_in_header) + sizeof *what)
		return;
	pthread_mutex_lock(&lock);
	for (one = *bucket_of(what->unique); one && one->bytes->unique != what->unique; one = one->in_bucket)
		;
	if (one)
		one->interrupted = 1;
	else {
		reads_interrupt(what->unique);
		pieces_interrupt(what->unique);
		interrupt(what->unique);
	}
	pthread_mutex_unlock(&lock);
}

static void wake(void) { eventfd_write(wakeup_fd, 1); }

static int is_full(const struct request *one)
{
	return user_of(one) == KERNEL ? queued_forgets > FORGETS : queued > QUEUED;
}

/* Waits for memory and for room in the queue: a caller waits for the request, so it can't be dropped. */
void device_pass_on(const char *bytes, size_t size, int64_t read_at, const int *was_interrupted)
{
	struct request *one;
	int was_empty, done = 0;

	while (!(one = copy_of(bytes, size, read_at)) && !stopping)
		usleep(1000);
	while (one && !done && !stopping) {
		pthread_mutex_lock(&lock);
		while (is_full(one) && !over)
			pthread_cond_wait(&taken, &lock);
		was_empty = !users;
		one->interrupted = was_interrupted && *was_interrupted;
		done = append(one);
		if (done && was_empty)
			wake();
		pthread_mutex_unlock(&lock);
		if (!done)
			usleep(1000);
	}
	if (!done)
		discard(one);
}

static void end_with(int how)
{
	pthread_mutex_lock(&lock);
	over = how;
	wake();
	pthread_mutex_unlock(&lock);
}

void device_retry_reads(void)
{
	retries_reads = 1;
	eventfd_write(thread_fd, 1);
}

/* Until there is a request, or reads that wait here are to be looked at again. */
static void sleep_until_woken(void)
{
	struct pollfd watched[] = {{.fd = device, .events = POLLIN}, {.fd = thread_fd, .events = POLLIN}};
	int64_t until = reads_wait_until(), left = until - device_now();
	eventfd_t ignored;

	if (poll(watched, 2, until == INT64_MAX ? -1 : left > 0 ? (int)(left / 1000000) + 1 : 0) > 0 && watched[1].revents)
		eventfd_read(thread_fd, &ignored);
}

/* Reads one request. Returns its size, 0 if no more will come, or -errno. Spins for a moment before it
 * sleeps. */
static ssize_t receive(void)
{
	int64_t spin_until = 0;
	ssize_t size;

	while (!stopping) {
		if (atomic_exchange(&retries_reads, 0) || reads_wait_until() <= device_now())
			reads_retry(device);
		size = read(device, buffer, REQUEST);
		/* ECONNABORTED: the mount ended while the kernel handed out a request (fuse_dev_do_read) */
		if (size >= 0 || errno == ENODEV || errno == ECONNABORTED)
			return size > 0 ? size : 0;
		if (errno == EINTR || errno == ENOENT) /* ENOENT: the request was withdrawn */
			continue;
		if (errno != EAGAIN)
			return -errno;
		if (!spin_until)
			spin_until = device_now() + SPIN_NS;
		if (device_now() < spin_until)
			sched_yield();
		else
			sleep_until_woken();
	}
	return 0;
}

static void call_listener(const struct fuse_in_header *request, size_t size)
{
	const char *name = (const char *)(request + 1);

	if (listener && request->opcode == FUSE_LOOKUP && request->nodeid == FUSE_ROOT_ID)
		listener(listeners_own, name, strnlen(name, size - sizeof *request));
}

static void *run(void *unused)
{
	const struct fuse_in_header *request = (const void *)buffer;
	ssize_t size = 0;

	while ((size = receive()) > 0)
		if ((size_t)size < sizeof *request)
			continue;
		else if (request->opcode == FUSE_INTERRUPT)
			note_interrupt(buffer, size);
		else if (!opens_answer(device, request, size) && !reads_answer(device, request, size) &&
			 !pieces_answer(device, request, size)) {
			call_listener(request, size);
			device_pass_on(buffer, size, device_now(), NULL);
		}
	end_with(size < 0 ? (int)size : 1);
	return unused;
}

static struct request *take(int *how)
{
	struct request *one;
	eventfd_t ignored;

	pthread_mutex_lock(&lock);
	one = pop();
	if (one && one->interrupted)
		interrupt(one->bytes->unique); /* Python gets this after the request's handler has begun */
	*how = over;
	pthread_cond_signal(&taken);
	if (!users && !over)
		eventfd_read(wakeup_fd, &ignored);
	pthread_mutex_unlock(&lock);
	return one;
}

/* read(2) for libfuse. After EINTR pyfuse3 waits for the next request; after ENODEV the session ends. */
static ssize_t read_for_libfuse(int unused, void *out, size_t room, void *session)
{
	int how;
	struct request *one = take(&how);
	size_t size;

	(void)unused, (void)session;
	if (!one || one->size > room) {
		discard(one);
		errno = one ? EIO : how < 0 ? -how : how ? ENODEV : EINTR;
		return -1;
	}
	device_current = one->bytes->unique;
	device_waited = device_now() - one->read_at;
	size = reply_expect(one->bytes, one->size);
	memcpy(out, one->bytes, size);
	discard(one);
	return size;
}

static ssize_t write_for_libfuse(int unused, struct iovec *parts, int count, void *session)
{
	int before = reply_init_result();
	ssize_t written = reply_from_libfuse(device, parts, count);
	int failed = errno;

	(void)unused, (void)session;
	if (reply_init_result() != before)
		device_notify();
	errno = failed;
	return written;
}

/* Returns 0 or errno. */
static int start(int from)
{
	sigset_t all, before;
	int failed;

	thread_fd = eventfd(0, EFD_CLOEXEC);
	if (thread_fd < 0 || fcntl(from, F_SETFL, fcntl(from, F_GETFL) | O_NONBLOCK) < 0)
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

/* Replaces libfuse's function. `mountpoint` is /dev/fd/N, where N is a device that is mounted already.
 * Returns 0 or -1. */
int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
	static const struct fuse_custom_io io = {.read = read_for_libfuse, .writev = write_for_libfuse};
	int from;

	if (sscanf(mountpoint, "/dev/fd/%d", &from) != 1)
		return -1;
	wakeup_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (wakeup_fd < 0 || fuse_session_custom_io(session, &io, wakeup_fd)) /* libfuse closes wakeup_fd at the end */
		return -1;
	start_error = start(from);
	return start_error ? -1 : 0;
}

/* The errno of the failure that prevented the thread's start; 0 if there was none. */
int device_start_error(void) { return start_error; }

/* Whether the thread runs. If not, pyfuse3 has called libfuse's fuse_session_mount: it was imported before
 * this library was loaded. */
int device_started(void) { return device >= 0; }

/* Call this before a session. The eventfd `notify` will say when there is something new from
 * device_interrupted or reply_init_result, and when opens should be drained. */
void device_prepare(int notify, int readahead, int passthrough)
{
	notify_fd = notify;
	over = stopping = retries_reads = start_error = 0;
	reply_prepare(readahead, passthrough);
}

/* Call this before a session, and with NULL after it. */
void device_listen(void (*call)(void *, const char *, size_t), void *own)
{
	listener = call;
	listeners_own = own;
}

/* Lets the kernel read the open file `file` itself. Returns the backing id, which is positive, or -errno. */
int device_backing_open(int file)
{
	struct backing_map map = {.fd = file};
	int id = ioctl(device, BACKING_OPEN, &map);

	return id < 0 ? -errno : id;
}

/* Files that are open with this backing id stay open. */
void device_backing_close(int id)
{
	uint32_t backing = id;

	ioctl(device, BACKING_CLOSE, &backing);
}

/* The number of a request whose caller got a signal, each once; 0 if there is none. */
uint64_t device_interrupted(void)
{
	uint64_t unique = 0;

	pthread_mutex_lock(&lock);
	if (interrupted.count)
		unique = interrupted.numbers[--interrupted.count];
	pthread_mutex_unlock(&lock);
	return unique;
}

/* Ends the thread. Queued requests are dropped. */
void device_stop(void)
{
	struct request *gone;

	if (device >= 0) {
		stopping = 1;
		eventfd_write(thread_fd, 1);
		pthread_mutex_lock(&lock);
		over = 1;
		pthread_cond_broadcast(&taken);
		pthread_mutex_unlock(&lock);
		pthread_join(thread, NULL);
		reads_stop();
		pieces_stop();
	}
	while ((gone = pop()))
		discard(gone);
	interrupted.count = 0;
	opens_clear();
	free(buffer);
	buffer = NULL;
	if (thread_fd >= 0)
		close(thread_fd);
	notify_fd = wakeup_fd = device = thread_fd = -1;
}
