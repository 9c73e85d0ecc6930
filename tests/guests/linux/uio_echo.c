/* A driver in a program: sends one packet on a VMBus channel that uio_hv_generic holds, and prints one that comes.
 *
 * uio_echo DEVICE TEXT: DEVICE is such as uio0. Needs Linux 6.10 or later, whose uio_hv_generic
 * rings the host when the interrupt is enabled.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HEAD 4096
#define VM_PKT_DATA_INBAND 6

struct ring {
	volatile uint32_t write_index, read_index, interrupt_mask, pending_send_sz;
};
struct descriptor {
	uint16_t type, offset8, len8, flags;
	uint64_t trans_id;
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *at(struct ring *ring, uint32_t offset)
{
	return (char *)ring + HEAD + offset;
}

/* Each ring has a page of indices, then its bytes; what wraps round is left out, since this is the first packet. */
static void put(struct ring *ring, const char *text)
{
	uint32_t length = strlen(text), padded = (length + 7) & ~7u, from = ring->write_index;
	struct descriptor head = { VM_PKT_DATA_INBAND, 2, 2 + padded / 8, 0, 1 };
	uint64_t trailer = (uint64_t)from << 32;

	memcpy(at(ring, from), &head, sizeof(head));
	memset(at(ring, from + 16), 0, padded);
	memcpy(at(ring, from + 16), text, length);
	memcpy(at(ring, from + 16 + padded), &trailer, 8);
	__sync_synchronize();
	ring->write_index = from + 16 + padded + 8;
	__sync_synchronize();
}

static void ring_the_host(int fd)
{
	int32_t on = 1;

	if (write(fd, &on, sizeof(on)) != sizeof(on))
		fail("write");
}

int main(int argc, char **argv)
{
	char path[128];
	unsigned long size = 0;
	int32_t interrupts;

	if (argc != 3)
		return 2;
	snprintf(path, sizeof(path), "/sys/class/uio/%s/maps/map0/size", argv[1]);
	FILE *file = fopen(path, "r");
	if (!file || fscanf(file, "%lx", &size) != 1)
		fail(path);
	snprintf(path, sizeof(path), "/dev/%s", argv[1]);
	int fd = open(path, O_RDWR); /* opens the channel */
	if (fd < 0)
		fail(path);
	struct ring *out = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (out == MAP_FAILED)
		fail("mmap");
	struct ring *in = (struct ring *)((char *)out + size / 2);
	put(out, argv[2]);
	ring_the_host(fd);
	while (in->write_index == in->read_index) {
		if (read(fd, &interrupts, sizeof(interrupts)) != sizeof(interrupts))
			fail("read");
		if (in->write_index == in->read_index)
			ring_the_host(fd);
	}
	struct descriptor *head = at(in, in->read_index);
	uint32_t begin = in->read_index + head->offset8 * 8, end = in->read_index + head->len8 * 8;
	printf("%.*s\n", (int)(end - begin), (char *)at(in, begin));
	__sync_synchronize();
	in->read_index = end + 8;
	return 0;
}
