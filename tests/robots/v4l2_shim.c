/* LD_PRELOAD library: makes the file $V4L2_SHIM look like a 30 Hz MJPG webcam whose every frame is that file.
 *
 * The descriptor the program gets is a timer, so that select() on it behaves like a driver's. While FILE.stall exists
 * no frame comes; when FILE is gone, the camera is unplugged. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { BUFFERS = 8, BUFFER_BYTES = 1 << 20, WIDTH = 640, HEIGHT = 480, FPS = 30 };

static int camera = -1;
static int ticking;
static unsigned count, queue[BUFFERS], queued;
static void *memory[BUFFERS];

static int tick(int on) {
    struct itimerspec every = {{0, on ? 1000000000 / FPS : 0}, {0, on ? 1000000000 / FPS : 0}};
    if (ticking != on) timerfd_settime(camera, 0, &every, NULL);
    ticking = on;
    return 0;
}

static int open_camera(void) {
    if (access(getenv("V4L2_SHIM"), R_OK)) return errno = ENODEV, -1;
    count = queued = 0, ticking = 0;
    return camera = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
}

static int is_camera(const char *path) {
    const char *device = getenv("V4L2_SHIM");
    return device && path && !strcmp(path, device);
}

#define DEFINE_OPEN(NAME)                                                    \
    int NAME(const char *path, int flags, ...) {                             \
        static int (*real)(const char *, int, ...);                          \
        if (!real) real = dlsym(RTLD_NEXT, #NAME);                           \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                        \
        return is_camera(path) ? open_camera() : real(path, flags, mode);    \
    }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

int close(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "close");
    if (fd == camera) camera = -1;
    return real(fd);
}

#define DEFINE_MMAP(NAME)                                                                    \
    void *NAME(void *at, size_t size, int protection, int flags, int fd, off_t offset) {     \
        static void *(*real)(void *, size_t, int, int, int, off_t);                          \
        if (!real) real = dlsym(RTLD_NEXT, #NAME);                                           \
        if (fd < 0 || fd != camera) return real(at, size, protection, flags, fd, offset);    \
        protection = PROT_READ | PROT_WRITE; /* the program asks for reading only */         \
        flags = MAP_PRIVATE | MAP_ANONYMOUS;                                                 \
        void *buffer = real(NULL, BUFFER_BYTES, protection, flags, -1, 0);                   \
        return memory[offset / BUFFER_BYTES] = buffer;                                       \
    }
DEFINE_MMAP(mmap)
DEFINE_MMAP(mmap64)

static int dequeue(struct v4l2_buffer *buffer) {
    const char *path = getenv("V4L2_SHIM");
    char stall[4096];
    uint64_t ticks;
    snprintf(stall, sizeof stall, "%s.stall", path);
    if (access(path, R_OK)) return errno = ENODEV, -1;
    tick(access(stall, F_OK) != 0);
    if (!queued || read(camera, &ticks, sizeof ticks) < 0) return errno = EAGAIN, -1;
    buffer->index = queue[0];
    memmove(queue, queue + 1, sizeof queue[0] * --queued);
    FILE *picture = fopen(path, "r"); /* libc opens it by itself, not through the open() above */
    if (!picture) return errno = ENODEV, -1;
    buffer->bytesused = fread(memory[buffer->index], 1, BUFFER_BYTES, picture);
    fclose(picture);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    buffer->timestamp = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    buffer->flags = V4L2_BUF_FLAG_DONE | V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC;
    buffer->length = BUFFER_BYTES;
    return 0;
}

static int answer(unsigned request, void *argument) {
    switch (request) {
    case VIDIOC_QUERYCAP: {
        struct v4l2_capability *is = argument;
        memset(is, 0, sizeof *is);
        strcpy((char *)is->driver, "uvcvideo");
        strcpy((char *)is->card, "emulated camera");
        is->device_caps = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        is->capabilities = is->device_caps | V4L2_CAP_DEVICE_CAPS;
        return 0;
    }
    case VIDIOC_ENUMINPUT: {
        struct v4l2_input *input = argument;
        if (input->index) return errno = EINVAL, -1;
        input->type = V4L2_INPUT_TYPE_CAMERA;
        return 0;
    }
    case VIDIOC_G_INPUT: return *(int *)argument = 0;
    case VIDIOC_S_INPUT: return 0;
    case VIDIOC_G_FMT:
    case VIDIOC_TRY_FMT:
    case VIDIOC_S_FMT: {
        struct v4l2_format *format = argument;
        if (format->type != V4L2_BUF_TYPE_VIDEO_CAPTURE) return errno = EINVAL, -1;
        format->fmt.pix = (struct v4l2_pix_format){.width = WIDTH, .height = HEIGHT,
            .pixelformat = V4L2_PIX_FMT_MJPEG, .field = V4L2_FIELD_NONE, .sizeimage = BUFFER_BYTES};
        return 0;
    }
    case VIDIOC_G_PARM:
    case VIDIOC_S_PARM: {
        struct v4l2_captureparm *parameter = &((struct v4l2_streamparm *)argument)->parm.capture;
        parameter->capability = V4L2_CAP_TIMEPERFRAME;
        parameter->timeperframe = (struct v4l2_fract){1, FPS};
        return 0;
    }
    case VIDIOC_REQBUFS: {
        struct v4l2_requestbuffers *wanted = argument;
        count = wanted->count = wanted->count < BUFFERS ? wanted->count : BUFFERS;
        queued = 0;
        return 0;
    }
    case VIDIOC_QUERYBUF: {
        struct v4l2_buffer *buffer = argument;
        if (buffer->index >= count) return errno = EINVAL, -1;
        buffer->length = BUFFER_BYTES;
        buffer->m.offset = buffer->index * BUFFER_BYTES;
        return 0;
    }
    case VIDIOC_QBUF: queue[queued++] = ((struct v4l2_buffer *)argument)->index; return 0;
    case VIDIOC_DQBUF: return dequeue(argument);
    case VIDIOC_STREAMON: return tick(1);
    case VIDIOC_STREAMOFF: queued = 0; return tick(0);
    default: return errno = ENOTTY, -1;
    }
}

int ioctl(int fd, unsigned long request, ...) {
    static int (*real)(int, unsigned long, ...);
    if (!real) real = dlsym(RTLD_NEXT, "ioctl");
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return fd >= 0 && fd == camera ? answer((unsigned)request, argument) : real(fd, request, argument);
}
