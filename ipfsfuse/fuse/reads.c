/* Answers reads from memory without Python: read windows hold verified bytes of open files, or say that bytes are
 * being fetched ahead (device.py).
 *
 * For an ordinary user's mount the kernel asks for 128 KiB at a time, eight times for each leaf. A request
 * costs pyfuse3 and Python 0.1 ms, and pyfuse3 copies its replies while it holds Python's lock. A read whose
 * bytes are not there yet costs Python more than twice as much, because a task waits for them. So it waits here
 * for a moment, and goes to Python if the bytes do not come. With `passes_end_on`, the read of a window's last
 * byte goes to Python, so that Python knows how far the reader is.
 * Concurrency: one lock, which is not held while bytes are sent. A window whose bytes are being sent is not
 * freed. Call reads_expect, reads_add, reads_remove and reads_remove_all with Python's lock held.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "device.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define WINDOWS 512
#define PARTS 64                /* windows that one read may go through */
#define WAITING 256             /* reads that may wait for bytes; more go to Python */
#define PATIENCE_NS 50000000    /* how long a read waits here */

/* Bytes [start, end) of the file that is open as `handle`. No `content.buf`: they are expected. */
struct window {
	uint64_t handle, start, end;
	Py_buffer content;
	int passes_end_on;
	int in_use;             /* its bytes are being sent */
};

/* A read that waits for bytes. */
struct read {
	struct read *next;
	int64_t read_at;
	int interrupted;        /* its caller got a signal meanwhile */
	struct { struct fuse_in_header header; struct fuse_read_in what; } request;
};

enum found { PRESENT, EXPECTED, ABSENT };

static struct window *windows[WINDOWS];
static int count;
/* The reads that wait, the oldest first. Only the device's thread changes this list, so it needs the lock only for that. */
static struct read *first, **last = &first;
static int waiting;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sent = PTHREAD_COND_INITIALIZER;

/* -- the windows, for Python ---------------------------------------------------------------------------- */

/* Frees a window that is not in the array, or NULL. This may run Python code, so the caller must not hold our lock. */
static void discard(struct window *one)
{
	if (one && one->content.buf)
		PyBuffer_Release(&one->content);
	PyMem_Free(one);
}

/* The place in the array of the window that begins at `start`; `count` if there is none. */
static int place_of(uint64_t handle, uint64_t start)
{
	int each = 0;

	while (each < count && (windows[each]->handle != handle || windows[each]->start != start))
		each++;
	return each;
}

/* Takes the window that begins at `start` out of the array, then waits until nobody uses its bytes: no later read uses
 * them, so this takes no longer than one reply. NULL if there is none. */
static struct window *take_out(uint64_t handle, uint64_t start)
{
	int place = place_of(handle, start);
	struct window *one;

	if (place == count)
		return NULL;
	one = windows[place];
	windows[place] = windows[--count];
	while (one->in_use)
		pthread_cond_wait(&sent, &lock);
	return one;
}

static int is_awaited(const struct window *one)
{
	for (const struct read *each = first; each; each = each->next)
		if (each->request.what.fh == one->handle && each->request.what.offset < one->end &&
		    each->request.what.offset + each->request.what.size > one->start)
			return 1;
	return 0;
}

/* Takes out a window whose bytes are not there yet. NULL if there is none. */
static struct window *take_out_expected(void)
{
	for (int each = 0; each < count; each++)
		if (!windows[each]->content.buf)
			return take_out(windows[each]->handle, windows[each]->start);
	return NULL;
}

/* Puts a window into the array, instead of one that begins where it does. If the array is full, puts bytes instead of
 * what is expected, so that slow files take no room from others; frees the window if that can't be done. */
static void put(struct window *one)
{
	struct window *old;

	pthread_mutex_lock(&lock);
	old = take_out(one->handle, one->start);
	if (!old && count == WINDOWS && one->content.buf)
		old = take_out_expected();
	if (is_awaited(one) || (old && is_awaited(old)))
		device_retry_reads();
	if (count < WINDOWS) {
		windows[count++] = one;
		one = NULL;
	}
	pthread_mutex_unlock(&lock);
	discard(old);
	discard(one);
}

static struct window *new_window(uint64_t handle, uint64_t start, uint64_t size)
{
	struct window *one = size ? PyMem_Malloc(sizeof *one) : NULL;

	if (one)
		*one = (struct window){.handle = handle, .start = start, .end = start + size};
	return one;
}

/* Soon there will be `size` bytes at offset `start` of the file that is open as `handle`, or reads_remove is called: a read of
 * them waits for that. */
void reads_expect(uint64_t handle, uint64_t start, uint64_t size)
{
	struct window *one = new_window(handle, start, size);
	int is_there;

	pthread_mutex_lock(&lock);
	is_there = place_of(handle, start) < count;
	pthread_mutex_unlock(&lock);
	if (one && !is_there)
		put(one);
	else
		discard(one);
}

/* `content` stands at offset `start` of the file that is open as `handle`. It is held until it is removed.
 * With `passes_end_on`, the read of its last byte goes to Python. */
void reads_add(uint64_t handle, uint64_t start, PyObject *content, int passes_end_on)
{
	struct window *one;
	Py_buffer bytes;

	if (PyObject_GetBuffer(content, &bytes, PyBUF_SIMPLE)) {
		PyErr_Clear();
		return;
	}
	one = new_window(handle, start, bytes.len);
	if (!one) {
		PyBuffer_Release(&bytes);
		return;
	}
	one->content = bytes;
	one->passes_end_on = passes_end_on;
	put(one);
}

/* Nobody reads what was added at `start` once this has returned. Reads that wait for what was expected there go to Python. */
void reads_remove(uint64_t handle, uint64_t start)
{
	struct window *one;

	pthread_mutex_lock(&lock);
	one = take_out(handle, start);
	if (one && is_awaited(one))
		device_retry_reads();
	pthread_mutex_unlock(&lock);
	discard(one);
}

/* Call this when the device's thread has stopped. */
void reads_remove_all(void)
{
	while (count)
		discard(windows[--count]);
}

/* -- the reads, in the device's thread ------------------------------------------------------------------ */

/* Finds the windows that hold the bytes of a read, one behind the other. All are PRESENT, or some are EXPECTED, or Python
 * must answer. */
static enum found find(const struct fuse_read_in *what, struct window *found[PARTS], int *parts)
{
	uint64_t at = what->offset, end = at + what->size;
	enum found state = PRESENT;
	struct window *one;
	int each;

	for (*parts = 0; at < end; at = one->end) {
		for (each = 0; each < count; each++)
			if (windows[each]->handle == what->fh && windows[each]->start <= at && at < windows[each]->end)
				break;
		if (each == count || *parts == PARTS)
			return ABSENT;
		one = windows[each];
		if (one->passes_end_on && one->end <= end)
			return ABSENT;
		if (!one->content.buf)
			state = EXPECTED;
		found[(*parts)++] = one;
	}
	return *parts ? state : ABSENT;
}

/* Sends the bytes. The lock is held before and after, and not meanwhile. */
static enum reply send_from(int device, const struct fuse_in_header *request, const struct fuse_read_in *what,
			    struct window *const found[], int parts)
{
	struct iovec bytes[PARTS];
	uint64_t at = what->offset, end = at + what->size, stop;
	enum reply reply;

	for (int each = 0; each < parts; each++, at = stop) {
		stop = found[each]->end < end ? found[each]->end : end;
		bytes[each].iov_base = (char *)found[each]->content.buf + (at - found[each]->start);
		bytes[each].iov_len = stop - at;
		found[each]->in_use = 1;
	}
	pthread_mutex_unlock(&lock);
	reply = reply_send_parts(device, request->unique, bytes, parts);
	pthread_mutex_lock(&lock);
	for (int each = 0; each < parts; each++)
		found[each]->in_use = 0;
	pthread_cond_broadcast(&sent);
	return reply;
}

/* Lets a read wait here. Returns 0 where that can't be done. */
static int let_wait(const struct fuse_in_header *request)
{
	struct read *one = waiting < WAITING ? malloc(sizeof *one) : NULL;

	if (!one)
		return 0;
	memcpy(&one->request, request, sizeof one->request);
	one->next = NULL;
	one->read_at = device_now();
	one->interrupted = 0;
	*last = one;
	last = &one->next;
	waiting++;
	return 1;
}

int reads_answer(int device, const struct fuse_in_header *request, size_t size)
{
	const struct fuse_read_in *what = (const void *)(request + 1);
	struct window *found[PARTS];
	int parts, done = 0;

	if (request->opcode != FUSE_READ || size < sizeof *request + sizeof *what)
		return 0;
	pthread_mutex_lock(&lock);
	switch (find(what, found, &parts)) {
	case PRESENT:
		done = send_from(device, request, what, found, parts) != REPLY_FAILED;
		break;
	case EXPECTED:
		done = let_wait(request);
		break;
	case ABSENT:
		break;
	}
	pthread_mutex_unlock(&lock);
	return done;
}

/* Answers reads that have waited for their bytes, and passes on those that must not wait any longer. */
void reads_retry(int device)
{
	struct read *one, **place = &first;
	struct window *found[PARTS];
	enum found state;
	int parts, done;

	pthread_mutex_lock(&lock);
	while ((one = *place)) {
		state = find(&one->request.what, found, &parts);
		if (state == EXPECTED && !one->interrupted && device_now() < one->read_at + PATIENCE_NS) {
			place = &one->next;
			continue;
		}
		done = state == PRESENT && send_from(device, &one->request.header, &one->request.what, found, parts) != REPLY_FAILED;
		*place = one->next;
		if (!one->next)
			last = place;
		waiting--;
		pthread_mutex_unlock(&lock);
		if (!done)
			device_pass_on((const char *)&one->request, sizeof one->request, one->read_at, &one->interrupted);
		free(one);
		pthread_mutex_lock(&lock);
	}
	pthread_mutex_unlock(&lock);
}

/* When the first of them must not wait any longer, by device_now; INT64_MAX if none waits. */
int64_t reads_wait_until(void) { return first ? first->read_at + PATIENCE_NS : INT64_MAX; }

/* The caller of the request `unique` got a signal. */
void reads_interrupt(uint64_t unique)
{
	for (struct read *each = first; each; each = each->next)
		if (each->request.header.unique == unique) {
			each->interrupted = 1;
			device_retry_reads();
		}
}

/* Drops what waits. Call this when the device's thread has stopped. */
void reads_stop(void)
{
	struct read *one;

	while ((one = first)) {
		first = one->next;
		free(one);
	}
	last = &first;
	waiting = 0;
}
