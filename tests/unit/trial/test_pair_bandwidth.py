"""What NCCL's log says about the connections between hosts."""

from mixtral_run.trial.pair_bandwidth import transports_of

LOG = """\
gpu-01:4242:4243 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>
gpu-01:4242:4250 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [receive] via NET/IB/0/GDRDMA
gpu-01:4242:4250 [0] NCCL INFO Channel 01/0 : 8[0] -> 0[0] [receive] via NET/IB/1
gpu-01:4242:4250 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
gpu-01:4242:4250 [0] NCCL INFO Channel 02/0 : 0[0] -> 8[0] [send] via NET/Socket/0
gpu-01:4242:4250 [0] NCCL INFO Channel 03/0 : 0[0] -> 8[0] [send] via NET/IB/3/GDRDMA
gpu-01:4242:4250 [0] NCCL INFO Channel 04/0 : 1[1] -> 9[1] [send] via NET/IB/0(0)/GDRDMA
gpu-01:4242:4250 [0] NCCL INFO Channel 05/0 : 1[1] -> 9[1] [send] via NET/IB/2(10)
"""


def test_connections_between_hosts_are_counted_by_kind() -> None:
    assert transports_of(LOG) == {"IB/GDRDMA": 3, "IB": 2, "Socket": 1}
    assert transports_of("") == {}
