/* The functions that the files of this library call in each other: device.c calls opens.c, reads.c and
 * pieces.c, and all call replies.c. */
#ifndef IPFSFUSE_DEVICE_H
#define IPFSFUSE_DEVICE_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* replies.c */

enum reply {
	REPLY_SENT,   /* The kernel has the reply. */
	REPLY_GONE,   /* The request is over: no process waits for the reply. */
	REPLY_FAILED, /* The reply could not be sent, and the request still waits: pass it on to Python. */
};

/* Answers the request `unique` with `size` bytes of `body`. Waits at most about 0.1 s. */
enum reply reply_send(int device, uint64_t unique, const void *body, size_t size);

/* The same, of a body in `count` parts, at most 64. */
enum reply reply_send_parts(int device, uint64_t unique, const struct iovec *body, int count);

/* Stores `content` at the beginning of the kernel's page cache of `inode`. Returns 0 if that fails: the kernel
 * has forgotten the inode, or has no memory. */
int reply_store(int device, uint64_t inode, const void *content, uint32_t size);

/* Extends and sends a reply or notification of libfuse. Returns what writev returns. */
ssize_t reply_from_libfuse(int device, struct iovec *parts, int count);

/* Prepares a request for libfuse, so that the reply says which opcode it answers. Returns its size. */
size_t reply_expect(struct fuse_in_header *request, size_t size);

/* Call this before a session. Without `readahead` the kernel requests only what programs read. With
 * `passthrough` it is asked to let files be opened with a backing file. */
void reply_prepare(int readahead, int passthrough);

/* The result of INIT: 0 if it has not been answered yet, -errno if it was refused, else INIT_DONE and the
 * INIT_ flags of what is on. */
int reply_init_result(void);

/* opens.c, reads.c and pieces.c: each `answer` returns whether it has answered the request, which has `size`
 * bytes. If not, Python must. */

int opens_answer(int device, const struct fuse_in_header *request, size_t size);
void opens_clear(void);

int reads_answer(int device, const struct fuse_in_header *request, size_t size);
void reads_retry(int device);
int64_t reads_wait_until(void);
void reads_interrupt(uint64_t unique);
void reads_stop(void);

int pieces_answer(int device, const struct fuse_in_header *request, size_t size);
void pieces_interrupt(uint64_t unique);
void pieces_stop(void);

/* device.c */

/* Queues a request for Python that was read from the device at the time `read_at`, by device_now. It is interrupted if
 * `*was_interrupted`. */
void device_pass_on(const char *request, size_t size, int64_t read_at, const int *was_interrupted);

/* Has the device's thread call reads_retry soon. Any thread may call this. */
void device_retry_reads(void);

/* Wakes Python to look at what is new: interrupted requests, opens to drain, or the result of INIT. Any thread may
 * call this. */
void device_notify(void);

/* By the monotonic clock, in nanoseconds. */
int64_t device_now(void);

#endif
