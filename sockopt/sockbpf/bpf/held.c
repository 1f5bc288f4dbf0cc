// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// held writes one record for each TCP-AO key, and, where it is asked for them, each TCP-MD5 key that a socket of the namespace holds, in which
// the iterator was opened: sock_diag doesn't show TCP-AO's. A listener without keys has one record, too: with it, connections that were
// accepted and those that this host opened are told apart. No key is read, only whom it is for.

#include "kernel.h"

char _license[] SEC("license") = "GPL";

// As in decode.go. LISTENER is a record without a key.
enum kind { LISTENER = 0, MD5 = 1, AO = 2 };

// A socket has no more records than this: they have to fit into the 32 KiB that are read at once. The last one says that there are more.
#define MAX_RECORDS 300

// with_md5 says that TCP-MD5's are asked for.
volatile const bool with_md5;

// struct held is a record. As in decode.go, in the order of the machine's bytes but for the addresses.
struct held {
	__u8 local[16];
	__u8 remote[16];
	__u8 peer[16];
	__u64 cookie;
	__s32 bound_dev;
	__u16 size; // of the record
	__u16 local_port;
	__u16 remote_port;
	__u8 family;
	__u8 state;
	__u8 kind;
	__u8 peer_family;
	__u8 prefixlen;
	__u8 more; // the socket has more keys, which are not told
	__u32 uid; // as the reader's user namespace has it
	__u8 file; // the socket has one; before 6.17 the uid of one without is 0, whosever it is
	__u8 reserved[3];
};

_Static_assert(sizeof(struct held) == 80, "decode.go knows it so");

static void socket_of(struct held *h, struct sock_common *skc)
{
	h->size = sizeof(*h);
	h->family = skc->skc_family;
	h->state = skc->skc_state;
	h->local_port = skc->skc_num;
	h->remote_port = bpf_ntohs(skc->skc_dport);
	h->bound_dev = skc->skc_bound_dev_if;
	h->cookie = skc->skc_cookie.counter;
	if (h->family == AF_INET6 && bpf_core_field_exists(skc->skc_v6_daddr)) {
		BPF_CORE_READ_INTO(&h->local, skc, skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&h->remote, skc, skc_v6_daddr);
	} else {
		*(__be32 *)h->local = skc->skc_rcv_saddr;
		*(__be32 *)h->remote = skc->skc_daddr;
	}
}

// The first member of a key is its node, so that both have one address.
static __always_inline void md5_peer(struct held *h, struct hlist_node *node)
{
	struct tcp_md5sig_key *key = (void *)node;
	h->peer_family = BPF_CORE_READ(key, family);
	h->prefixlen = BPF_CORE_READ(key, prefixlen);
	if (h->peer_family == AF_INET6)
		BPF_CORE_READ_INTO(&h->peer, key, addr.a6);
	else
		BPF_CORE_READ_INTO((__be32 *)h->peer, key, addr.a4.s_addr);
}

static __always_inline void ao_peer(struct held *h, struct hlist_node *node)
{
	struct tcp_ao_key *key = (void *)node;

	if (!bpf_core_type_exists(struct tcp_ao_key))
		return;
	h->peer_family = BPF_CORE_READ(key, family);
	h->prefixlen = BPF_CORE_READ(key, prefixlen);
	if (h->peer_family == AF_INET6)
		BPF_CORE_READ_INTO(&h->peer, key, addr.a6);
	else
		BPF_CORE_READ_INTO((__be32 *)h->peer, key, addr.a4.s_addr);
}

static __always_inline int write_keys(struct seq_file *seq, struct held *h, struct hlist_node *node, __u8 kind)
{
	int n;

	h->kind = kind;
	for (n = 0; n < MAX_RECORDS && node; n++) {
		__builtin_memset(h->peer, 0, sizeof(h->peer));
		if (kind == MD5)
			md5_peer(h, node);
		else
			ao_peer(h, node);
		node = BPF_CORE_READ(node, next);
		h->more = n == MAX_RECORDS - 1 && node;
		bpf_seq_write(seq, h, sizeof(*h));
	}
	return n;
}

SEC("iter/tcp")
int held(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct tcp_md5sig_info *md5;
	struct tcp_ao_info *ao;
	struct tcp_sock *tp;
	struct held h = {};
	int n = 0;

	if (!skc || skc->skc_state == TCP_TIME_WAIT || skc->skc_state == TCP_NEW_SYN_RECV)
		return 0;
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		return 0;
	socket_of(&h, skc);
	h.uid = ctx->uid;
	h.file = !!((struct sock *)tp)->sk_socket;
	if (bpf_core_field_exists(tp->ao_info)) {
		ao = tp->ao_info;
		if (ao)
			n = write_keys(ctx->meta->seq, &h, BPF_CORE_READ(ao, head.first), AO);
	}
	if (with_md5 && bpf_core_field_exists(tp->md5sig_info) && !n) {
		md5 = tp->md5sig_info;
		if (md5)
			n = write_keys(ctx->meta->seq, &h, md5->head.first, MD5);
	}
	if (!n && h.state == TCP_LISTEN) {
		h.kind = LISTENER;
		bpf_seq_write(ctx->meta->seq, &h, sizeof(h));
	}
	return 0;
}
