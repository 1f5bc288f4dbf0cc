// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// conns writes one record for each TCP socket of the namespace in which the iterator was opened: what the kernel itself has of it.
// Nothing is decided here but xfrm_dst_offload_ok, which follows pointers; the rest is decided in Go, where it is tested.

#include "kernel.h"

char _license[] SEC("license") = "GPL";

// What a record says by bits. As in decode.go.
#define CONN_GSO_DISABLED (1 << 0)
#define CONN_ROUTE (1 << 1)
#define CONN_XFRM (1 << 2)
#define CONN_XFRM_OFFLOAD_OK (1 << 3)
#define CONN_XFRM_DEVICE (1 << 4)
#define CONN_V6ONLY (1 << 5)

// The chain of keys of one socket is followed so far.
#define MAX_KEYS 0xffff

// struct conn is a record. As in decode.go, in the order of the machine's bytes but for the addresses.
struct conn {
	__u64 inode;
	__u64 cookie;
	__u64 route_caps;
	__u64 dev_features;
	__u8 local[16];
	__u8 remote[16];
	__u16 size; // of the record
	__u8 family;
	__u8 state;
	__u32 flags;
	__u32 uid;
	__u32 mark;
	__s32 bound_dev;
	__u32 gso_type;
	__u32 gso_max_size;
	__u32 dev_gso_max_segs;
	__s32 dev;
	__u32 mss;
	__u16 local_port;
	__u16 remote_port;
	__u16 md5_keys;
	__u16 ao_keys;
	__u16 gso_max_segs;
	__u16 header_len;
	__u32 reserved;
};

_Static_assert(sizeof(struct conn) == 120, "decode.go knows it so");

struct chain {
	__u64 node;
};

static long next_key(__u32 i, struct chain *chain)
{
	struct hlist_node *node = (void *)chain->node;

	(void)i;
	if (!node)
		return 1;
	chain->node = (__u64)BPF_CORE_READ(node, next);
	return 0;
}

// count_keys is the length of a list. Each node is the first member of its key (tcp_md5sig_key, tcp_ao_key); keys are freed after an
// RCU grace period, and the iterator runs under RCU.
static __u16 count_keys(struct hlist_node *first)
{
	struct chain chain = { .node = (__u64)first };
	long n;

	if (!first)
		return 0;
	n = bpf_loop(MAX_KEYS, next_key, &chain, 0);
	if (n <= 0)
		return 0;
	// The round that found the end is counted as well.
	return chain.node ? MAX_KEYS : n - 1;
}

static void addresses(struct conn *c, struct sock_common *skc)
{
	c->family = skc->skc_family;
	c->state = skc->skc_state;
	c->local_port = skc->skc_num;
	c->remote_port = bpf_ntohs(skc->skc_dport);
	c->bound_dev = skc->skc_bound_dev_if;
	c->cookie = skc->skc_cookie.counter;
	if (c->family == AF_INET6 && BPF_CORE_READ_BITFIELD(skc, skc_ipv6only))
		c->flags |= CONN_V6ONLY;
	if (c->family == AF_INET6 && bpf_core_field_exists(skc->skc_v6_daddr)) {
		BPF_CORE_READ_INTO(&c->local, skc, skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&c->remote, skc, skc_v6_daddr);
	} else {
		*(__be32 *)c->local = skc->skc_rcv_saddr;
		*(__be32 *)c->remote = skc->skc_daddr;
	}
}

// xfrm is what the state of a bundle does (xfrm_dst_offload_ok, include/net/xfrm.h).
static __u32 xfrm(struct dst_entry *dst)
{
	struct xfrm_dst *xdst = (void *)dst;
	struct xfrm_state *x;
	__u32 flags = CONN_XFRM;
	unsigned long handle = 0;

	if (!bpf_core_field_exists(dst->xfrm))
		return 0;
	x = dst->xfrm;
	if (!x)
		return 0;
	if (!x->type_offload || BPF_CORE_READ(xdst, child, xfrm))
		return flags;
	if (bpf_core_field_exists(x->xso.offload_handle))
		handle = x->xso.offload_handle;
	if (!handle)
		return flags | CONN_XFRM_OFFLOAD_OK;
	if (x->xso.dev == BPF_CORE_READ(xdst, path, dev))
		flags |= CONN_XFRM_OFFLOAD_OK | CONN_XFRM_DEVICE;
	return flags;
}

static void route(struct conn *c, struct dst_entry *dst)
{
	struct net_device *dev;

	if (!dst)
		return;
	c->header_len = dst->header_len;
	c->flags |= CONN_ROUTE | xfrm(dst);
	dev = dst->dev;
	if (!dev)
		return;
	c->dev = dev->ifindex;
	c->dev_features = dev->features;
	c->dev_gso_max_segs = BPF_CORE_READ_BITFIELD(dev, gso_max_segs);
}

static void full(struct conn *c, struct tcp_sock *tp, struct sock *sk)
{
	struct tcp_md5sig_info *md5;
	struct tcp_ao_info *ao;
	struct socket *socket;

	c->mark = sk->sk_mark;
	c->mss = tp->mss_cache;
	c->route_caps = sk->sk_route_caps;
	// An int in 6.1 and a u16 in 6.12: what reads bit fields reads by the kernel's own size.
	c->gso_type = BPF_CORE_READ_BITFIELD(sk, sk_gso_type);
	c->gso_max_size = sk->sk_gso_max_size;
	c->gso_max_segs = sk->sk_gso_max_segs;
	if (BPF_CORE_READ_BITFIELD(sk, sk_gso_disabled))
		c->flags |= CONN_GSO_DISABLED;
	if (bpf_core_field_exists(sk->sk_ino)) {
		c->inode = sk->sk_ino;
	} else {
		socket = sk->sk_socket;
		if (socket)
			c->inode = BPF_CORE_READ((struct socket_alloc *)socket, vfs_inode.i_ino);
	}
	if (bpf_core_field_exists(tp->md5sig_info)) {
		md5 = tp->md5sig_info;
		if (md5)
			c->md5_keys = count_keys(md5->head.first);
	}
	if (bpf_core_field_exists(tp->ao_info)) {
		ao = tp->ao_info;
		if (ao)
			c->ao_keys = count_keys(BPF_CORE_READ(ao, head.first));
	}
	route(c, sk->sk_dst_cache);
}

static void time_wait(struct conn *c, struct tcp_timewait_sock *tw)
{
	c->mark = tw->tw_sk.tw_mark;
	if (bpf_core_field_exists(tw->tw_md5_key))
		c->md5_keys = tw->tw_md5_key ? 1 : 0;
	if (bpf_core_field_exists(tw->ao_info) && tw->ao_info)
		c->ao_keys = count_keys(BPF_CORE_READ(tw->ao_info, head.first));
}

SEC("iter/tcp")
int conns(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct tcp_timewait_sock *tw;
	struct tcp_request_sock *req;
	struct conn c = {};
	struct tcp_sock *tp;

	if (!skc)
		return 0; // after the last one
	c.size = sizeof(c);
	c.uid = ctx->uid;
	addresses(&c, skc);

	switch (c.state) {
	case TCP_TIME_WAIT:
		tw = bpf_skc_to_tcp_timewait_sock(skc);
		if (!tw)
			return 0;
		time_wait(&c, tw);
		break;
	case TCP_NEW_SYN_RECV:
		req = bpf_skc_to_tcp_request_sock(skc);
		if (!req)
			return 0;
		c.mark = req->req.ir_mark;
		break;
	default:
		tp = bpf_skc_to_tcp_sock(skc);
		if (!tp)
			return 0;
		full(&c, tp, (struct sock *)tp);
	}
	bpf_seq_write(ctx->meta->seq, &c, sizeof(c));
	return 0;
}
