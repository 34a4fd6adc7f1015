/* The tags of the pieces of a leaf, for Python. */
#include "tags.h"

/* Writes the tags of the pieces of `bytes` to `tags`, one after the other. Each piece has `piece` bytes; the
 * last one may have fewer. */
void tags_of(const uint8_t *key, const uint8_t *bytes, size_t size, size_t piece, uint8_t *tags)
{
	for (size_t at = 0; at < size; at += piece, tags += TAG)
		tag_of(key, bytes + at, size - at < piece ? size - at : piece, tags);
}
