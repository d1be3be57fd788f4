/* Answers OPEN and CREATE with a kernel passthrough to a backing file, which libfuse 3.14 and pyfuse3
 * cannot say.
 *
 * Stateless. pyfuse3 calls fuse_reply_open and fuse_reply_create of whoever comes first in the global
 * scope; loaded with RTLD_GLOBAL before pyfuse3, those are the ones below. A handle whose upper 32
 * bits are not zero carries the backing id there: the reply is then written here, by libfuse's own
 * fuse_reply_iov. Every other reply goes on to libfuse.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 314
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <math.h>
#include <stdint.h>
#include <sys/uio.h>

#define BACKING_ID_SHIFT 32
#define REPLY_PASSTHROUGH (1u << 7) /* FOPEN_PASSTHROUGH of linux/fuse.h since Linux 6.9 */
#define NS_PER_S 1e9

/* struct fuse_open_out of the kernel's protocol 7.40 and later. */
struct open_reply {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

typedef int (*reply_open)(fuse_req_t, const struct fuse_file_info *);
typedef int (*reply_create)(fuse_req_t, const struct fuse_entry_param *,
                            const struct fuse_file_info *);

static uint32_t backing_id_of(const struct fuse_file_info *info)
{
    return (uint32_t)(info->fh >> BACKING_ID_SHIFT);
}

static struct open_reply passed_through(const struct fuse_file_info *info)
{
    return (struct open_reply){
        .fh = info->fh,
        .open_flags = REPLY_PASSTHROUGH,
        .backing_id = (int32_t)backing_id_of(info),
    };
}

/* A timeout as the kernel counts it; pyfuse3 gives seconds, far below what would overflow. */
static void set_timeout(double timeout_s, uint64_t *seconds, uint32_t *nanoseconds)
{
    double whole = timeout_s > 0 ? floor(timeout_s) : 0;
    *seconds = (uint64_t)whole;
    *nanoseconds = timeout_s > 0 ? (uint32_t)((timeout_s - whole) * NS_PER_S) : 0;
}

static struct fuse_entry_out entry_of(const struct fuse_entry_param *given)
{
    const struct stat *status = &given->attr;
    struct fuse_entry_out entry = {
        .nodeid = given->ino,
        .generation = given->generation,
        .attr = {
            .ino = status->st_ino,
            .size = (uint64_t)status->st_size,
            .blocks = (uint64_t)status->st_blocks,
            .atime = (uint64_t)status->st_atim.tv_sec,
            .mtime = (uint64_t)status->st_mtim.tv_sec,
            .ctime = (uint64_t)status->st_ctim.tv_sec,
            .atimensec = (uint32_t)status->st_atim.tv_nsec,
            .mtimensec = (uint32_t)status->st_mtim.tv_nsec,
            .ctimensec = (uint32_t)status->st_ctim.tv_nsec,
            .mode = status->st_mode,
            .nlink = (uint32_t)status->st_nlink,
            .uid = status->st_uid,
            .gid = status->st_gid,
            .rdev = (uint32_t)status->st_rdev,
            .blksize = (uint32_t)status->st_blksize,
        },
    };
    set_timeout(given->entry_timeout, &entry.entry_valid, &entry.entry_valid_nsec);
    set_timeout(given->attr_timeout, &entry.attr_valid, &entry.attr_valid_nsec);
    return entry;
}

int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *info)
{
    if (backing_id_of(info) == 0) {
        reply_open next = (reply_open)dlsym(RTLD_NEXT, "fuse_reply_open");
        return next ? next(req, info) : fuse_reply_err(req, ENOSYS);
    }
    struct open_reply reply = passed_through(info);
    struct iovec piece = {.iov_base = &reply, .iov_len = sizeof(reply)};
    return fuse_reply_iov(req, &piece, 1);
}

int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *given,
                      const struct fuse_file_info *info)
{
    if (backing_id_of(info) == 0) {
        reply_create next = (reply_create)dlsym(RTLD_NEXT, "fuse_reply_create");
        return next ? next(req, given, info) : fuse_reply_err(req, ENOSYS);
    }
    struct fuse_entry_out entry = entry_of(given);
    struct open_reply reply = passed_through(info);
    struct iovec pieces[] = {
        {.iov_base = &entry, .iov_len = sizeof(entry)},
        {.iov_base = &reply, .iov_len = sizeof(reply)},
    };
    return fuse_reply_iov(req, pieces, 2);
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_reply",
    .m_doc = "Loaded for its fuse_reply_open and fuse_reply_create; has nothing for Python.",
    .m_size = 0,
};

PyMODINIT_FUNC PyInit__reply(void)
{
    return PyModule_Create(&module);
}
