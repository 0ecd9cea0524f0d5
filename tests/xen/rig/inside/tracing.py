import subprocess, sys, time
from tests.xen.rig.inside.dom0 import *
check = Checks()
@check
def traced(lab):
    start_vtpm(lab)
    ours("attach", *DEVICE, "--force")
    start_bridge(lab)
    async def commands(client):
        assert await powered_code(client) == 0
        ps = [subprocess.Popen(["strace","-f","-ttt","-o",f"/host/trace.{n}","-p",str(lab.kept[n].process.pid), "-e","trace=poll,read,write,ioctl,ppoll,sendto,recvfrom,sendmsg,recvmsg,readv,writev,epoll_wait"]) for n in ("vtpm","bridge")]
        time.sleep(3)
        times = []
        for _ in range(12):
            began = time.monotonic()
            t=time.time()
            assert await client.code(GET_RANDOM) == 0
            times.append((t,round(1000 * (time.monotonic() - began))))
        for p in ps: p.terminate()
        return times
    r = with_client(commands)
    b = status(STATUS)["pump"]; v = status("/tmp/v.status")
    return [r, b, v["frontends"], v["pump"]]
if __name__ == "__main__":
    sys.exit(check.run())
