/* Reads that need nobody: of bytes that are verified and wait in memory for the reader of an open file (porter.py).
 *
 * A user's kernel asks for 128 KiB at a time, eight times a leaf, and a request costs pyfuse3 and Python 0.1 ms; and pyfuse3
 * copies its replies with Python's lock held. Of some windows the read that takes the last byte is passed on, so that Python knows how
 * far its readers are.
 * Concurrency: one lock; a window is not taken away while an answer is copied from it. `offer` and the two below it must be
 * called with Python's lock.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "porter.h"

#include <pthread.h>

#define WINDOWS 256

struct window { uint64_t handle, start, end; Py_buffer content; };   /* `end`: no read to or beyond it is answered */

static struct window *windows[WINDOWS];
static int held;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Of one that the porter does not see, or of none. It may run Python's code, so not under our lock. */
static void let_go(struct window *one)
{
	if (one)
		PyBuffer_Release(&one->content);
	PyMem_Free(one);
}

/* `content` stands at `start` in the file that `handle` has open, and is kept until it is withdrawn. With `told`, who reads its last
 * byte asks Python. Does nothing where there are too many already. */
void reads_offer(uint64_t handle, uint64_t start, PyObject *content, int told)
{
	struct window *one = PyMem_Malloc(sizeof *one);

	if (!one || PyObject_GetBuffer(content, &one->content, PyBUF_SIMPLE)) {
		PyErr_Clear();
		PyMem_Free(one);
		return;
	}
	one->handle = handle;
	one->start = start;
	one->end = start + one->content.len + !told;
	pthread_mutex_lock(&lock);
	if (held < WINDOWS) {
		windows[held++] = one;
		one = NULL;
	}
	pthread_mutex_unlock(&lock);
	let_go(one);
}

void reads_withdraw(uint64_t handle, uint64_t start)
{
	struct window *found = NULL;

	pthread_mutex_lock(&lock);
	for (int each = 0; each < held && !found; each++)
		if (windows[each]->handle == handle && windows[each]->start == start) {
			found = windows[each];
			windows[each] = windows[--held];
		}
	pthread_mutex_unlock(&lock);
	let_go(found);
}

/* Once the porter has gone home. */
void reads_withdraw_all(void)
{
	while (held)
		let_go(windows[--held]);
}

static int read_from_window(int device, const struct fuse_in_header *request, const struct fuse_read_in *what)
{
	uint64_t end = what->offset + what->size;

	for (int each = 0; each < held; each++) {
		const struct window *one = windows[each];

		if (one->handle == what->fh && one->start <= what->offset && end > what->offset && end < one->end) {
			porter_reply(device, request->unique, (char *)one->content.buf + (what->offset - one->start), what->size);
			return 1;
		}
	}
	return 0;
}

int reads_answered(int device, const struct fuse_in_header *request, size_t size)
{
	int done;

	if (request->opcode != FUSE_READ || size < sizeof *request + sizeof(struct fuse_read_in))
		return 0;
	pthread_mutex_lock(&lock);
	done = read_from_window(device, request, (const void *)(request + 1));
	pthread_mutex_unlock(&lock);
	return done;
}
