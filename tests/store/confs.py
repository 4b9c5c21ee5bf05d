"""What the servers of `tests.store.servers` are configured with: one machine, one copy, in memory where they can."""

from __future__ import annotations

CEPH = """\
[global]
fsid = {identity}
mon_host = [v2:127.0.0.1:{monitor}/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_supported = none
ms_mon_client_mode = crc
ms_mon_service_mode = crc
ms_cluster_mode = crc
ms_service_mode = crc
ms_client_mode = crc
ms_mon_cluster_mode = crc
osd_heartbeat_grace = 3600
mon_warn_on_insecure_global_id_reclaim = false
osd_numa_auto_affinity = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_warn_on_pool_no_redundancy = false
run_dir = {dir}/run
admin_socket = {dir}/run/$name.$pid.asok
pid_file = {dir}/run/$name.pid
log_file = {dir}/$name.log
keyring = {dir}/keyring
debug_ms = 0
mon_initial_members = a
paxos_propose_interval = 0.05
mon_tick_interval = 1
[mon.a]
mon_data = {dir}/mon
mon_data_avail_crit = 0
mon_data_avail_warn = 0
[osd.0]
osd_data = {dir}/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
[client.rgw]
rgw_data = {dir}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_enable_apis = s3, admin
rgw_thread_pool_size = 64
rgw_multipart_min_part_size = 1
rgw_enable_ops_log = false
rgw_enable_usage_log = false
rgw_run_sync_thread = false
rgw_enable_quota_threads = false
rgw_dns_name = 127.0.0.1
"""

SWIFT = """\
[swift-hash]
swift_hash_path_suffix = test
[storage-policy:0]
name = gold
default = yes
[swift-constraints]
max_file_size = 5368709122
"""

SWIFT_RING = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {dir}
devices = {dir}/data
mount_check = false
log_address = {dir}/no-syslog
log_level = ERROR
workers = 0
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
fallocate_reserve = 0
replication_concurrency = 0
"""

SWIFT_PROXY = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {dir}
log_address = {dir}/no-syslog
log_level = ERROR
workers = 0
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats etag-quoter s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
client_timeout = 120
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:etag-quoter]
use = egg:swift#etag_quoter
enable_by_default = false
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
min_segment_size = 1
auth_pipeline_check = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testtest .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

SWIFT_BUILD_RINGS = """\
import sys
from swift.common.ring import RingBuilder
names = iter(sys.argv[1:])
for name, port in zip(names, names):
    builder = RingBuilder(4, 1, 1)
    where = dict(ip="127.0.0.1", port=int(port), replication_ip="127.0.0.1", replication_port=int(port))
    builder.add_dev(dict(id=0, region=1, zone=1, weight=1.0, device="d1", meta="", **where))
    builder.rebalance()
    builder.save(name + ".builder")
    builder.get_ring().save(name + ".ring.gz")
"""
"""For a Python that has Swift: its own command takes a second for each of nine steps."""
