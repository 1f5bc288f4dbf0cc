/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The parts of the kernel's structures that the programs read. Offsets, sizes and even the presence of a field are those of the
 * running kernel: each access is relocated by its BTF when the program is loaded (CO-RE), so the order and the neighbours of a field
 * don't matter here, only its name and its structure's.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u16 __le16;
typedef __u32 __le32;
typedef __u64 __le64;
typedef __u32 __wsum;
typedef __u16 __sum16;

typedef _Bool bool;
#define true 1
#define false 0

enum { BPF_MAP_TYPE_RINGBUF = 27 };

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_tracing.h>

#define AF_INET 2
#define AF_INET6 10

/* include/net/tcp_states.h */
#define TCP_ESTABLISHED 1
#define TCP_SYN_SENT 2
#define TCP_SYN_RECV 3
#define TCP_TIME_WAIT 6
#define TCP_CLOSE 7
#define TCP_LISTEN 10
#define TCP_NEW_SYN_RECV 12

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct in_addr {
	__be32 s_addr;
};

struct in6_addr {
	union {
		__u8 u6_addr8[16];
		__be32 u6_addr32[4];
	} in6_u;
};

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

typedef struct {
	__s64 counter;
} atomic64_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned char skc_ipv6only : 1;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
};

struct net_device {
	__u64 features; /* netdev_features_t */
	unsigned int gso_max_segs;
	int ifindex;
};

struct xfrm_type_offload {};

struct xfrm_dev_offload {
	struct net_device *dev;
	unsigned long offload_handle;
};

struct xfrm_state {
	struct xfrm_dev_offload xso;
	const struct xfrm_type_offload *type_offload;
};

struct dst_entry {
	struct net_device *dev;
	struct xfrm_state *xfrm;
	unsigned short header_len;
};

struct xfrm_dst {
	struct dst_entry *child;
	struct dst_entry *path;
};

struct inode {
	unsigned long i_ino;
};

struct socket {
	short type;
};

struct socket_alloc {
	struct socket socket;
	struct inode vfs_inode;
};

struct sock {
	struct sock_common __sk_common;
	struct socket *sk_socket;
	unsigned long sk_ino;
	__u32 sk_mark;
	struct dst_entry *sk_dst_cache;
	__u64 sk_route_caps; /* netdev_features_t */
	int sk_gso_type;
	__u16 sk_gso_max_segs;
	unsigned int sk_gso_max_size;
	__u8 sk_gso_disabled : 1;
};

struct inet_sock {
	__be16 inet_sport;
};

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct tcp_md5sig_info {
	struct hlist_head head;
};

struct tcp_ao_info {
	struct hlist_head head;
};

/* A key of TCP-MD5 without the key: key and keylen have no name here, so that they can't be read. */
struct tcp_md5sig_key {
	struct hlist_node node;
	__u8 family;
	__u8 prefixlen;
	union tcp_md5_addr {
		struct in_addr a4;
		struct in6_addr a6;
	} addr;
};

/* A key of TCP-AO without the key: key, keylen and traffic_keys have no name here, so that they can't be read. */
struct tcp_ao_key {
	struct hlist_node node;
	union tcp_ao_addr {
		struct in_addr a4;
		struct in6_addr a6;
	} addr;
	int l3index;
	__u8 prefixlen;
	__u8 family;
};

struct tcp_sock {
	__u32 mss_cache;
	struct tcp_md5sig_info *md5sig_info;
	struct tcp_ao_info *ao_info;
};

struct inet_timewait_sock {
	struct sock_common __tw_common;
	__u32 tw_mark;
};

struct tcp_timewait_sock {
	struct inet_timewait_sock tw_sk;
	struct tcp_md5sig_key *tw_md5_key;
	struct tcp_ao_info *ao_info;
};

struct inet_request_sock {
	__u32 ir_mark;
};

struct tcp_request_sock {
	struct inet_request_sock req;
};

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 seq_num;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
	__u32 uid;
};

#pragma clang attribute pop
