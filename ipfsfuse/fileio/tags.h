/* The tag of a piece of a verified leaf. When the piece is read again, its tag shows whether the bytes are
 * the same.
 *
 * The tag is the polynomial of Poly1305 (D. J. Bernstein, "The Poly1305-AES message-authentication code",
 * 2005), at a secret point. Keys and tags never leave this process's memory, so nobody can choose bytes to
 * match a tag: other bytes of the same length have the same tag with a probability of less than 2^-90. A
 * cryptographic digest would take longer. The two halves of each 32 bytes go into two polynomials, because
 * each step of a polynomial waits for its own products.
 */
#ifndef IPFSFUSE_TAGS_H
#define IPFSFUSE_TAGS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TAG 16     /* bytes of a tag */
#define TAG_KEY 32 /* bytes of the key: the point, and the point at which both polynomials become one */

typedef unsigned __int128 tag_wide;

struct tag_point { uint64_t low, high, high_by_5_4; };

/* A number modulo 2^130 - 5. */
struct tag_sum { uint64_t low, middle, high; };

static inline uint64_t tag_word(const uint8_t *bytes)
{
	uint64_t word;

	memcpy(&word, bytes, sizeof word);
	return word;
}

static inline struct tag_point tag_point_of(const uint8_t *key)
{
	uint64_t high = tag_word(key + 8) & 0x0ffffffc0ffffffcULL;

	return (struct tag_point){tag_word(key) & 0x0ffffffc0fffffffULL, high, high + (high >> 2)};
}

/* (sum + the three added words) * point. The clamped point leaves room for the carries. */
static inline struct tag_sum tag_step(struct tag_sum sum, uint64_t low, uint64_t middle, uint64_t high, struct tag_point at)
{
	tag_wide first, second;
	uint64_t carry;

	first = (tag_wide)sum.low + low;
	second = (tag_wide)sum.middle + middle + (uint64_t)(first >> 64);
	sum.low = (uint64_t)first;
	sum.middle = (uint64_t)second;
	sum.high += high + (uint64_t)(second >> 64);
	first = (tag_wide)sum.low * at.low + (tag_wide)sum.middle * at.high_by_5_4;
	second = (tag_wide)sum.low * at.high + (tag_wide)sum.middle * at.low + sum.high * at.high_by_5_4 + (uint64_t)(first >> 64);
	sum.high = sum.high * at.low + (uint64_t)(second >> 64);
	carry = (sum.high >> 2) + (sum.high & ~3ULL);
	sum.high &= 3;
	first = (tag_wide)(uint64_t)first + carry;
	second = (tag_wide)(uint64_t)second + (uint64_t)(first >> 64);
	sum.low = (uint64_t)first;
	sum.middle = (uint64_t)second;
	sum.high += (uint64_t)(second >> 64);
	return sum;
}

/* Writes the tag of `size` bytes. The last 32 bytes are filled up with zeros, which is safe because the
 * length of a piece is known. */
static inline void tag_of(const uint8_t key[TAG_KEY], const uint8_t *bytes, size_t size, uint8_t tag[TAG])
{
	struct tag_point at = tag_point_of(key), last = tag_point_of(key + 16);
	struct tag_sum one = {0, 0, 0}, other = {0, 0, 0};
	uint8_t rest[32] = {0};

	for (; size >= 32; bytes += 32, size -= 32) {
		one = tag_step(one, tag_word(bytes), tag_word(bytes + 8), 1, at);
		other = tag_step(other, tag_word(bytes + 16), tag_word(bytes + 24), 1, at);
	}
	if (size) {
		memcpy(rest, bytes, size);
		one = tag_step(one, tag_word(rest), tag_word(rest + 8), 1, at);
		other = tag_step(other, tag_word(rest + 16), tag_word(rest + 24), 1, at);
	}
	one = tag_step(one, 0, 0, 0, last);
	one = tag_step(one, other.low, other.middle, other.high, last);
	memcpy(tag, &one.low, 8);
	memcpy(tag + 8, &one.middle, 8);
}

#endif
