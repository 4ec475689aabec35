/* Sends UDP packets of three sizes in turn out of an interface at a steady rate.
 *
 *     capture_send INTERFACE COUNT RATE
 *
 * Prints how many were sent, the seconds that it took, and the CPU seconds of this process: what
 * the receiving side's filters cost, the kernel does in its time.
 */
#define _GNU_SOURCE
#include <net/if.h>
#include <netpacket/packet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 63, ROOM = 2048 };

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void fill(unsigned char *p, int size)
{
	static const unsigned char head[] = {
		2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0,
		0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2,
		0x30, 0x39, 0x1f, 0x90,
	};

	memcpy(p, head, sizeof(head));
	p[16] = (size - 14) >> 8;
	p[17] = size - 14;
	p[38] = (size - 34) >> 8;
	p[39] = size - 34;
}

int main(int argc, char **argv)
{
	static const int sizes[] = { 66, 200, 1400 };
	static unsigned char data[BATCH][ROOM];
	struct mmsghdr messages[BATCH] = { 0 };
	struct iovec parts[BATCH];
	struct sockaddr_ll to = { .sll_family = AF_PACKET };
	struct rusage used;
	long count, sent = 0;
	double rate, begun, took;
	int one = 1, i, fd;

	if (argc != 4)
		return 2;
	count = atol(argv[2]);
	rate = atof(argv[3]);
	to.sll_ifindex = if_nametoindex(argv[1]);
	fd = socket(AF_PACKET, SOCK_RAW, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&to, sizeof(to))) {
		perror(argv[1]);
		return 1;
	}
	setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one));
	for (i = 0; i < BATCH; i++) {
		fill(data[i], sizes[i % 3]);
		parts[i] = (struct iovec){ data[i], sizes[i % 3] };
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	begun = now();
	while (sent < count) {
		long left = count - sent;
		int done = sendmmsg(fd, messages, left < BATCH ? left : BATCH, 0);
		double ahead;

		if (done > 0)
			sent += done;
		ahead = sent / rate - (now() - begun);
		if (ahead > 0.0002)
			usleep(ahead * 1e6);
	}
	took = now() - begun;
	getrusage(RUSAGE_SELF, &used);
	printf("%ld %.6f %.6f\n", sent, took,
	       used.ru_utime.tv_sec + used.ru_stime.tv_sec +
	       (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
	return 0;
}
