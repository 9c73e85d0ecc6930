/*
 * AF_VSOCK programs for a Linux guest, to be held against the host's end.
 *
 *   vsock [-t SECONDS] connect PORT ACTION [ARG]
 *   vsock listen PORT COUNT ACTION [ARG]
 *   vsock [-t SECONDS] burst PORT COUNT
 *
 * Actions on a connection: "send N" sends N bytes and says that no more comes,
 * "recv" takes all there is, "both N" does both at a time, "echo" sends back what
 * comes, "half" says at once that it sends nothing and takes all there is, "hold"
 * takes nothing and stays. Each then waits for the other side's end and prints one
 * line: bytes and CRC-32 each way, and milliseconds. "listen" serves COUNT
 * connections, each in a process of its own, and prints "listening" when it does.
 * "burst" makes COUNT connections one after the other, and wants a few bytes back
 * on each. -t is for how long connecting may take.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

static uint32_t crc_tables[8][256];
static long patience = 60;

struct flow {
	uint64_t bytes;
	uint32_t crc;
};

static void fail(const char *what)
{
	printf("vsock: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	_exit(1);
}

static void make_crc_tables(void)
{
	for (unsigned byte = 0; byte < 256; byte++) {
		uint32_t value = byte;

		for (int bit = 0; bit < 8; bit++)
			value = value & 1 ? value >> 1 ^ 0xEDB88320u : value >> 1;
		crc_tables[0][byte] = value;
	}
	for (unsigned byte = 0; byte < 256; byte++)
		for (int step = 1; step < 8; step++) {
			uint32_t before = crc_tables[step - 1][byte];

			crc_tables[step][byte] = before >> 8 ^ crc_tables[0][before & 255];
		}
}

/* Eight bytes a step: an emulated guest must keep up with a hundred megabytes. */
static void count(struct flow *flow, const unsigned char *data, size_t size)
{
	uint32_t crc = ~flow->crc;

	flow->bytes += size;
	for (; size >= 8; size -= 8, data += 8) {
		uint64_t word;

		memcpy(&word, data, 8);
		word ^= crc;
		crc = 0;
		for (int byte = 0; byte < 8; byte++)
			crc ^= crc_tables[7 - byte][word >> 8 * byte & 255];
	}
	for (; size; size--, data++)
		crc = crc >> 8 ^ crc_tables[0][(crc ^ *data) & 255];
	flow->crc = ~crc;
}

static uint64_t milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000ull + now.tv_nsec / 1000000;
}

static void send_all(int fd, const void *data, size_t size)
{
	const char *next = data;

	while (size) {
		ssize_t sent = send(fd, next, size, MSG_NOSIGNAL);

		if (sent < 0)
			fail("send");
		next += sent;
		size -= sent;
	}
}

static void send_stream(int fd, uint64_t bytes, struct flow *flow)
{
	static uint64_t block[8192];
	uint64_t state = 88172645463325252ull + bytes;

	while (bytes) {
		size_t size = bytes < sizeof block ? bytes : sizeof block;

		for (size_t word = 0; word * 8 < size; word++) {
			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
			block[word] = state;
		}
		count(flow, (unsigned char *)block, size);
		send_all(fd, block, size);
		bytes -= size;
	}
}

static void end_sending(int fd)
{
	if (shutdown(fd, SHUT_WR))
		fail("shutdown");
}

static void receive_all(int fd, struct flow *flow, int back)
{
	static unsigned char buffer[1 << 16];

	for (;;) {
		ssize_t size = recv(fd, buffer, sizeof buffer, 0);

		if (size < 0)
			fail("recv");
		if (!size)
			return;
		count(flow, buffer, size);
		if (back)
			send_all(fd, buffer, size);
	}
}

static void act(int fd, const char *action, const char *argument)
{
	struct flow in = {0}, out = {0};
	uint64_t bytes = argument ? strtoull(argument, NULL, 0) : 0;
	uint64_t start = milliseconds();
	pid_t child = 0;

	if (!strcmp(action, "hold")) {
		printf("holding\n");
		fflush(stdout);
		for (;;)
			pause();
	}
	if (!strcmp(action, "both")) {
		child = fork();
		if (child < 0)
			fail("fork");
		if (!child) {
			receive_all(fd, &in, 0);
			printf("received %llu crc %08x\n", (unsigned long long)in.bytes, in.crc);
			fflush(stdout);
			_exit(0);
		}
	}
	if (!strcmp(action, "send") || !strcmp(action, "both"))
		send_stream(fd, bytes, &out);
	if (!strcmp(action, "send") || !strcmp(action, "both") || !strcmp(action, "half"))
		end_sending(fd);
	if (child)
		waitpid(child, NULL, 0);
	else
		receive_all(fd, &in, !strcmp(action, "echo"));
	if (!strcmp(action, "echo"))
		end_sending(fd);
	printf("%s done: sent %llu crc %08x, received %llu crc %08x, %llu ms\n", action,
	       (unsigned long long)out.bytes, out.crc, (unsigned long long)in.bytes, in.crc,
	       (unsigned long long)(milliseconds() - start));
	fflush(stdout);
	close(fd);
}

static int open_socket(void)
{
	struct timeval timeout = {.tv_sec = patience};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0)
		fail("socket");
	if (setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &timeout, sizeof timeout))
		fail("setsockopt");
	return fd;
}

static int connect_to(unsigned port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
	int fd = open_socket();

	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		fail("connect");
	return fd;
}

static void serve(unsigned port, int connections, const char *action, const char *argument)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
	int fd = open_socket();

	if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 64))
		fail("listen");
	printf("listening on %u\n", port);
	fflush(stdout);
	for (int served = 0; served < connections; served++) {
		int one = accept(fd, NULL, NULL);

		if (one < 0)
			fail("accept");
		if (!fork()) {
			close(fd);
			act(one, action, argument);
			_exit(0);
		}
		close(one);
	}
	while (wait(NULL) > 0)
		;
}

static void burst(unsigned port, int connections)
{
	int good = 0;

	for (int number = 0; number < connections; number++) {
		int fd = connect_to(port);
		int answer = -1;

		send_all(fd, &number, sizeof number);
		if (recv(fd, &answer, sizeof answer, MSG_WAITALL) == sizeof answer && answer == number)
			good++;
		close(fd);
	}
	printf("burst done: %d of %d\n", good, connections);
}

int main(int argc, char **argv)
{
	int option;

	while ((option = getopt(argc, argv, "+t:")) != -1) {
		if (option == 't')
			patience = atol(optarg);
		else
			return 2;
	}
	argv += optind;
	argc -= optind;
	make_crc_tables();
	if (argc >= 3 && !strcmp(argv[0], "connect"))
		act(connect_to(atoi(argv[1])), argv[2], argc > 3 ? argv[3] : NULL);
	else if (argc >= 4 && !strcmp(argv[0], "listen"))
		serve(atoi(argv[1]), atoi(argv[2]), argv[3], argc > 4 ? argv[4] : NULL);
	else if (argc == 3 && !strcmp(argv[0], "burst"))
		burst(atoi(argv[1]), atoi(argv[2]));
	else
		return 2;
	return 0;
}
