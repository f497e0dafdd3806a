// Several hosts on one machine: network and UTS namespaces, and between them a switch with bandwidth and delay.
//
//     hosts FOLDER N RATE DELAY MTU COMMAND…      run COMMAND on the first of N hosts, end as it ends
//     FOLDER/agent [-options] HOST COMMAND…       run COMMAND on HOST: what mpirun takes for ssh
//
// FOLDER holds a file `hosts`, which takes the place of /etc/hosts. Each host has one link, a TUN device "link0" with the
// address 10.77.0.i, that sends RATE bit/s and receives RATE bit/s at the same time; whatever is sent arrives DELAY
// seconds after its last bit has left. Nothing is lost: a link that is busy keeps what waits for it.
//
// Everything lives in namespaces (mount and process numbers, too) that no file names outside: the kernel takes all of it
// back when this program ends, however it ends.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64, LONGEST = 65536, TIMER = MOST, SIGNAL };

typedef struct packet { struct packet *next; int64_t due; size_t size; unsigned char bytes[]; } packet;

typedef struct {                    // a host's link; times in nanoseconds
    int tun;
    int64_t sends_until, receives_until;
    packet *first, **last;          // on their way to this host, in the order in which they arrive
} port;

static void die(const char *what) {
    fprintf(stderr, "hosts: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void set(const char *name, const char *value) {      // a kernel parameter of this network namespace
    char path[256];
    snprintf(path, sizeof path, "/proc/sys/net/ipv4/%s", name);
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, value, strlen(value)) < 0) die(path);
    close(fd);
}

static void keep(const char *folder, int host, const char *kind) {      // FOLDER/h1.net …: how `agent` finds its way
    char path[512], own[64];
    snprintf(path, sizeof path, "%s/h%d.%s", folder, host, kind);
    snprintf(own, sizeof own, "/proc/self/ns/%s", kind);
    close(open(path, O_CREAT | O_WRONLY, 0600));
    if (mount(own, path, 0, MS_BIND, 0)) die(path);
}

static void enter(const char *folder, const char *host) {
    for (int i = 0; i < 2; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s.%s", folder, host, i ? "uts" : "net");
        int fd = open(path, O_RDONLY);
        if (fd < 0 || setns(fd, 0)) die(path);
        close(fd);
    }
}

static int raise_link(const char *name, int number, int mtu) {      // of the namespace that this process is in
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq r = {0};
    strcpy(r.ifr_name, name);
    struct sockaddr_in *address = (struct sockaddr_in *)&r.ifr_addr;
    address->sin_family = AF_INET;
    if (number) {
        address->sin_addr.s_addr = htonl(0x0a4d0000u + number);     // 10.77.0.number
        if (ioctl(s, SIOCSIFADDR, &r)) return -1;
        address->sin_addr.s_addr = htonl(0xffffff00u);
        if (ioctl(s, SIOCSIFNETMASK, &r)) return -1;
        r.ifr_mtu = mtu;
        if (ioctl(s, SIOCSIFMTU, &r)) return -1;
        r.ifr_qlen = 20000;         // else bursts of TCP's window are dropped before we see them
        if (ioctl(s, SIOCSIFTXQLEN, &r)) return -1;
    }
    r.ifr_flags = IFF_UP | IFF_RUNNING;
    int failed = ioctl(s, SIOCSIFFLAGS, &r);
    close(s);
    return failed;
}

static int new_host(const char *folder, int number, int mtu) {      // returns the TUN device
    char name[8];
    snprintf(name, sizeof name, "h%d", number);
    if (unshare(CLONE_NEWNET | CLONE_NEWUTS) || sethostname(name, strlen(name))) die("a new host");
    keep(folder, number, "net");
    keep(folder, number, "uts");
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq r = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(r.ifr_name, "link0");
    if (tun < 0 || ioctl(tun, TUNSETIFF, &r)) die("/dev/net/tun");
    if (raise_link("lo", 0, 0) || raise_link("link0", number, mtu)) die("link0");
    set("tcp_rmem", "4096 4194304 33554432");
    set("tcp_wmem", "4096 4194304 33554432");
    set("tcp_slow_start_after_idle", "0");      // as clusters have it: the window outlives the local steps
    set("tcp_congestion_control", "reno");
    return tun;
}

static void receive(port *ports, int n, int from, double rate, int64_t delay) {     // all that host `from` sends now
    static unsigned char bytes[LONGEST];
    ssize_t size;
    while ((size = read(ports[from].tun, bytes, sizeof bytes)) > 0) {
        int to = bytes[19] - 1;                             // IPv4, the last byte of the destination's address
        if (size < 20 || bytes[0] >> 4 != 4 || bytes[16] != 10 || bytes[17] != 77 || to < 0 || to >= n) continue;
        port *sender = &ports[from], *receiver = &ports[to];
        int64_t t = now(), takes = rate > 0 ? (int64_t)(size * 8e9 / rate) : 0;
        sender->sends_until = (sender->sends_until > t ? sender->sends_until : t) + takes;
        int64_t arrives = sender->sends_until + delay, free = receiver->receives_until + takes;
        receiver->receives_until = arrives > free ? arrives : free;
        packet *p = malloc(sizeof *p + size);
        if (!p) die("memory");
        *p = (packet){0, receiver->receives_until, size};
        memcpy(p->bytes, bytes, size);
        *receiver->last = p;
        receiver->last = &p->next;
    }
}

static int64_t deliver(port *ports, int n) {        // what is due; returns when the next packet is, 0 if there is none
    int64_t t = now(), next = 0;
    for (port *q = ports; q < ports + n; q++) {
        while (q->first && q->first->due <= t) {
            packet *p = q->first;
            if (write(q->tun, p->bytes, p->size) < 0 && errno == EAGAIN) break;
            if (!(q->first = p->next)) q->last = &q->first;
            free(p);
        }
        if (q->first && (!next || q->first->due < next)) next = q->first->due;
    }
    return next;
}

static int reap(pid_t child) {      // the status of `child` if it has ended, else -1; clears away all that have
    int status, found = -1;
    for (pid_t p; (p = waitpid(-1, &status, WNOHANG)) > 0;)
        if (p == child) found = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return found;
}

static int run_switch(port *ports, int n, double rate, int64_t delay, pid_t child, int signals) {
    int poll = epoll_create1(EPOLL_CLOEXEC), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    for (int i = 0; i < n + 2; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = i < n ? i : i == n ? TIMER : SIGNAL};
        epoll_ctl(poll, EPOLL_CTL_ADD, i < n ? ports[i].tun : i == n ? timer : signals, &e);
    }
    struct sched_param first = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_RR, &first)) setpriority(PRIO_PROCESS, 0, -20);     // packets are on time
    for (;;) {
        struct epoll_event events[MOST + 2];
        int found = epoll_wait(poll, events, MOST + 2, -1);
        for (int i = 0; i < found; i++) {
            uint32_t what = events[i].data.u32;
            uint64_t ticks;
            struct signalfd_siginfo got;
            if (what < MOST) receive(ports, n, what, rate, delay);
            else if (what == TIMER) { if (read(timer, &ticks, sizeof ticks) < 0) continue; }
            else if (read(signals, &got, sizeof got) > 0) {
                if (got.ssi_signo != SIGCHLD) kill(child, got.ssi_signo);
                int status = reap(child);
                if (status >= 0) return status;
            }
        }
        int64_t next = deliver(ports, n);
        struct itimerspec due = {.it_value = {next / 1000000000, next % 1000000000}};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &due, 0);
    }
}

static int init(char **command, sigset_t *asked) {      // process 1 of the hosts: when it ends, the kernel ends the rest
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (mount("proc", "/proc", "proc", 0, 0) || mount("sysfs", "/sys", "sysfs", 0, 0)) die("/proc or /sys");
    int signals = signalfd(-1, asked, SFD_CLOEXEC);
    pid_t child = fork();
    if (!child) {
        sigprocmask(SIG_UNBLOCK, asked, 0);
        setpgid(0, 0);
        execvp(*command, command);
        die(*command);
    }
    for (;;) {
        struct signalfd_siginfo got;
        if (read(signals, &got, sizeof got) < 0) continue;
        if (got.ssi_signo != SIGCHLD) kill(-child, got.ssi_signo);
        int status = reap(child);
        if (status >= 0) return status;
    }
}

static int agent(const char *self, char **words) {
    char folder[512], line[LONGEST] = "";
    snprintf(folder, sizeof folder, "%.*s", (int)(strrchr(self, '/') - self), self);
    while (*words && **words == '-') words++;
    if (!*words) return 2;
    enter(folder, *words++);
    if (unshare(CLONE_NEWNS) || mount("sysfs", "/sys", "sysfs", 0, 0)) die("/sys");     // shows this host's links
    for (; *words; words++) {       // as ssh: the words are one line for the shell
        strncat(line, *words, sizeof line - strlen(line) - 2);
        strcat(line, " ");
    }
    execl("/bin/sh", "sh", "-c", line, (char *)0);
    die("/bin/sh");
    return 1;
}

int main(int count, char **words) {
    const char *slash = strrchr(*words, '/');
    if (slash && !strcmp(slash, "/agent")) return agent(*words, words + 1);
    int n = count > 6 ? atoi(words[2]) : 0, mtu = count > 6 ? atoi(words[5]) : 0;
    if (n < 1 || n > MOST || mtu < 576 || mtu >= LONGEST) {
        fprintf(stderr, "hosts: expected FOLDER N RATE DELAY MTU COMMAND…, at most %d hosts\n", MOST);
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);       // who called us is there to clean up after us, or we are not
    const char *folder = words[1];
    double rate = atof(words[3]);
    int64_t delay = (int64_t)(1e9 * atof(words[4]));
    char names[512];
    snprintf(names, sizeof names, "%s/hosts", folder);
    if (unshare(CLONE_NEWNS) || mount("none", "/", 0, MS_REC | MS_PRIVATE, 0)) die("a mount namespace");
    if (mount(names, "/etc/hosts", 0, MS_BIND, 0)) die("/etc/hosts");
    static port ports[MOST];
    for (int i = 0; i < n; i++) {
        ports[i].tun = new_host(folder, i + 1, mtu);
        ports[i].last = &ports[i].first;
    }
    sigset_t asked;
    sigemptyset(&asked);
    for (int *s = (int[]){SIGINT, SIGTERM, SIGUSR1, SIGCHLD, 0}; *s; s++) sigaddset(&asked, *s);
    sigprocmask(SIG_BLOCK, &asked, 0);
    enter(folder, "h1");
    if (unshare(CLONE_NEWPID)) die("a process namespace");
    pid_t child = fork();
    if (!child) return init(words + 6, &asked);
    return run_switch(ports, n, rate, delay, child, signalfd(-1, &asked, SFD_CLOEXEC));
}
