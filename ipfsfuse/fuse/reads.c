/* Answers reads from memory without Python: read windows hold verified bytes of open files (device.py).
 *
 * For an ordinary user's mount the kernel asks for 128 KiB at a time, eight times for each leaf. A request
 * costs pyfuse3 and Python 0.1 ms, and pyfuse3 copies its replies while it holds Python's lock. With
 * `passes_end_on`, the read of a window's last byte goes to Python, so that Python knows how far the reader
 * is.
 * Concurrency: one lock; a window is not removed while an answer is copied from it. Call reads_add,
 * reads_remove and reads_remove_all with Python's lock held.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "device.h"

#include <pthread.h>

#define WINDOWS 256

struct window { uint64_t handle, start, end; Py_buffer content; }; /* a read to or beyond `end` is not answered here */

static struct window *windows[WINDOWS];
static int count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Frees a window that is not in the array, or NULL. This may run Python code, so the caller must not hold our
 * lock. */
static void discard(struct window *one)
{
	if (one)
		PyBuffer_Release(&one->content);
	PyMem_Free(one);
}

/* Adds a window: `content` is at offset `start` of the file that is open as `handle`. With `passes_end_on`,
 * the read of its last byte goes to Python. Does nothing if there are too many windows. */
void reads_add(uint64_t handle, uint64_t start, PyObject *content, int passes_end_on)
{
	struct window *one = PyMem_Malloc(sizeof *one);

	if (!one || PyObject_GetBuffer(content, &one->content, PyBUF_SIMPLE)) {
		PyErr_Clear();
		PyMem_Free(one);
		return;
	}
	one->handle = handle;
	one->start = start;
	one->end = start + one->content.len + !passes_end_on;
	pthread_mutex_lock(&lock);
	if (count < WINDOWS) {
		windows[count++] = one;
		one = NULL;
	}
	pthread_mutex_unlock(&lock);
	discard(one);
}

void reads_remove(uint64_t handle, uint64_t start)
{
	struct window *found = NULL;

	pthread_mutex_lock(&lock);
	for (int each = 0; each < count && !found; each++)
		if (windows[each]->handle == handle && windows[each]->start == start) {
			found = windows[each];
			windows[each] = windows[--count];
		}
	pthread_mutex_unlock(&lock);
	discard(found);
}

/* Call this when the device thread has stopped. */
void reads_remove_all(void)
{
	while (count)
		discard(windows[--count]);
}

static int answer_from_window(int device, const struct fuse_in_header *request, const struct fuse_read_in *what)
{
	uint64_t end = what->offset + what->size;

	for (int each = 0; each < count; each++) {
		const struct window *one = windows[each];

		if (one->handle == what->fh && one->start <= what->offset && end > what->offset && end < one->end) {
			const char *bytes = (const char *)one->content.buf + (what->offset - one->start);

			return reply_send(device, request->unique, bytes, what->size) != REPLY_FAILED;
		}
	}
	return 0;
}

int reads_answer(int device, const struct fuse_in_header *request, size_t size)
{
	int done;

	if (request->opcode != FUSE_READ || size < sizeof *request + sizeof(struct fuse_read_in))
		return 0;
	pthread_mutex_lock(&lock);
	done = answer_from_window(device, request, (const void *)(request + 1));
	pthread_mutex_unlock(&lock);
	return done;
}
