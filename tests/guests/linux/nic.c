/*
 * nic IFACE [rx|tx|sg|tso|gro|lro=0|1]...   set what a NIC does by itself; with none, tell
 * nic IFACE rx-gro-hw=0|1                   the same by the feature's name, where the NIC has it (virtio-net)
 * nic udp PORT                              send every datagram back to where it came from
 * nic join IFACE GROUP PORT                 join an IPv4 group, print the first datagram that comes
 * nic source|sink HOST PORT                 send, or take, a TCP stream until the other end closes
 *
 * Why: busybox has no ethtool, and no program that joins a group.
 */
#include <arpa/inet.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static const struct {
	const char *name;
	unsigned int get, set;
} features[] = {
	{ "rx", ETHTOOL_GRXCSUM, ETHTOOL_SRXCSUM }, { "tx", ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM },
	{ "sg", ETHTOOL_GSG, ETHTOOL_SSG },	    { "tso", ETHTOOL_GTSO, ETHTOOL_STSO },
	{ "gro", ETHTOOL_GGRO, ETHTOOL_SGRO },	    { "lro", ETHTOOL_GFLAGS, ETHTOOL_SFLAGS },
};
#define COUNT (sizeof(features) / sizeof(features[0]))

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static int ethtool(int fd, const char *iface, unsigned int command, unsigned int *data)
{
	struct ethtool_value value = { .cmd = command, .data = *data };
	struct ifreq request = { .ifr_data = (void *)&value };

	strncpy(request.ifr_name, iface, IFNAMSIZ - 1);
	if (ioctl(fd, SIOCETHTOOL, &request))
		return -1;
	*data = value.data;
	return 0;
}

#define NAMED 512 /* features that a kernel may have */

/* By the name that the kernel gives it. A NIC without the feature leaves it alone, which is no failure. */
static int set_named(int fd, const char *iface, const char *name, int on)
{
	static struct {
		struct ethtool_gstrings head;
		char names[NAMED][ETH_GSTRING_LEN];
	} told;
	static struct {
		struct ethtool_sfeatures head;
		struct ethtool_set_features_block blocks[NAMED / 32];
	} wanted;
	struct {
		struct ethtool_sset_info head;
		unsigned int count;
	} sets = { { .cmd = ETHTOOL_GSSET_INFO, .sset_mask = 1ULL << ETH_SS_FEATURES }, 0 };
	struct ifreq request = { .ifr_data = (void *)&sets };
	unsigned int i;

	strncpy(request.ifr_name, iface, IFNAMSIZ - 1);
	if (ioctl(fd, SIOCETHTOOL, &request) || !sets.count || sets.count > NAMED)
		return -1;
	told.head = (struct ethtool_gstrings){ ETHTOOL_GSTRINGS, ETH_SS_FEATURES, sets.count };
	request.ifr_data = (void *)&told;
	if (ioctl(fd, SIOCETHTOOL, &request))
		return -1;
	for (i = 0; i < sets.count && strncmp(told.names[i], name, ETH_GSTRING_LEN); i++)
		;
	if (i == sets.count)
		return -1;
	wanted.head = (struct ethtool_sfeatures){ ETHTOOL_SFEATURES, (sets.count + 31) / 32 };
	wanted.blocks[i / 32].valid = 1U << i % 32;
	wanted.blocks[i / 32].requested = (unsigned int)!!on << i % 32;
	request.ifr_data = (void *)&wanted;
	return ioctl(fd, SIOCETHTOOL, &request) < 0 ? -1 : 0;
}

static int set(int fd, const char *iface, const char *setting)
{
	if (!strncmp(setting, "rx-gro-hw=", 10))
		return set_named(fd, iface, "rx-gro-hw", atoi(setting + 10)) ? fail(setting) : 0;
	for (size_t i = 0; i < COUNT; i++) {
		size_t length = strlen(features[i].name);
		unsigned int data = 0;

		if (strncmp(setting, features[i].name, length) || setting[length] != '=')
			continue;
		if (!strcmp(features[i].name, "lro")) {
			if (ethtool(fd, iface, features[i].get, &data))
				return fail(setting);
			data &= ~ETH_FLAG_LRO;
			data |= atoi(setting + length + 1) ? ETH_FLAG_LRO : 0;
		} else {
			data = atoi(setting + length + 1);
		}
		return ethtool(fd, iface, features[i].set, &data) ? fail(setting) : 0;
	}
	fprintf(stderr, "%s: no such feature\n", setting);
	return 2;
}

static int tell(int fd, const char *iface)
{
	for (size_t i = 0; i < COUNT; i++) {
		unsigned int data = 0;

		if (ethtool(fd, iface, features[i].get, &data))
			return fail(features[i].name);
		if (!strcmp(features[i].name, "lro"))
			data &= ETH_FLAG_LRO;
		printf("%s=%d ", features[i].name, !!data);
	}
	printf("\n");
	return 0;
}

static int bound(int port)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	return fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof(here)) ? -1 : fd;
}

static int echo(int port)
{
	static char data[65536];
	int fd = bound(port);

	if (fd < 0)
		return fail("udp");
	for (;;) {
		struct sockaddr_in peer;
		socklen_t size = sizeof(peer);
		ssize_t count = recvfrom(fd, data, sizeof(data), 0, (struct sockaddr *)&peer, &size);

		if (count < 0)
			return fail("recvfrom");
		sendto(fd, data, count, 0, (struct sockaddr *)&peer, size);
	}
}

static int join(const char *iface, const char *group, int port)
{
	struct ip_mreqn request = { .imr_ifindex = (int)if_nametoindex(iface) };
	char data[1501];
	int fd = bound(port);
	ssize_t count;

	inet_aton(group, &request.imr_multiaddr);
	if (fd < 0 || setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &request, sizeof(request)))
		return fail("join");
	count = recv(fd, data, sizeof(data) - 1, 0);
	if (count < 0)
		return fail("recv");
	data[count] = 0;
	printf("%s\n", data);
	return 0;
}

static int stream(int source, const char *host, int port)
{
	static char data[1 << 17];
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	inet_aton(host, &peer.sin_addr);
	if (fd < 0 || connect(fd, (struct sockaddr *)&peer, sizeof(peer)))
		return fail(host);
	while ((source ? send(fd, data, sizeof(data), MSG_NOSIGNAL) : recv(fd, data, sizeof(data), 0)) > 0)
		;
	return 0;
}

int main(int argc, char **argv)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (argc == 3 && !strcmp(argv[1], "udp"))
		return echo(atoi(argv[2]));
	if (argc == 4 && (!strcmp(argv[1], "source") || !strcmp(argv[1], "sink")))
		return stream(argv[1][1] == 'o', argv[2], atoi(argv[3]));
	if (argc == 5 && !strcmp(argv[1], "join"))
		return join(argv[2], argv[3], atoi(argv[4]));
	for (int i = 2; i < argc; i++) {
		int status = set(fd, argv[1], argv[i]);

		if (status)
			return status;
	}
	return argc > 1 ? tell(fd, argv[1]) : 2;
}
