/* Answers OPEN with a kernel passthrough to a backing file, which libfuse 3.14 and pyfuse3 cannot say.
 *
 * Stateless. pyfuse3 calls fuse_reply_open of whoever comes first in the global scope; loaded with
 * RTLD_GLOBAL before pyfuse3, that is the one below. A handle whose upper 32 bits are not zero
 * carries the backing id there: the reply is then written here, by libfuse's own fuse_reply_iov.
 * Every other reply goes on to libfuse.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 314
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <sys/uio.h>

#define BACKING_ID_SHIFT 32
#define REPLY_PASSTHROUGH (1u << 7) /* FOPEN_PASSTHROUGH of linux/fuse.h */

/* struct fuse_open_out of the kernel's protocol 7.40 and later. */
struct open_reply {
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

typedef int (*reply_open)(fuse_req_t, const struct fuse_file_info *);

int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *info)
{
    uint32_t backing_id = (uint32_t)(info->fh >> BACKING_ID_SHIFT);
    if (backing_id == 0) {
        reply_open next = (reply_open)dlsym(RTLD_NEXT, "fuse_reply_open");
        return next ? next(req, info) : fuse_reply_err(req, ENOSYS);
    }
    struct open_reply reply = {
        .fh = info->fh,
        .open_flags = REPLY_PASSTHROUGH,
        .backing_id = (int32_t)backing_id,
    };
    struct iovec piece = {.iov_base = &reply, .iov_len = sizeof(reply)};
    return fuse_reply_iov(req, &piece, 1);
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_reply",
    .m_doc = "Loaded for its fuse_reply_open; has nothing for Python.",
    .m_size = 0,
};

PyMODINIT_FUNC PyInit__reply(void)
{
    return PyModule_Create(&module);
}
