// From Go, by cgo:
//
//	fastdtd embed squeezenet1_1 -o lib --name net
//	CGO_CFLAGS=-I$PWD/lib CGO_LDFLAGS=$PWD/lib/libnet.a go build -o explain explain.go
//	./explain INPUT.f32                            (C, H, W) float32, as net_preprocess_rgb makes it
package main

// #include <stdlib.h>
// #include "net.h"
import "C"

import (
	"encoding/binary"
	"fmt"
	"log"
	"math"
	"os"
	"unsafe"
)

const size = C.NET_CHANNELS * C.NET_HEIGHT * C.NET_WIDTH

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: explain INPUT.f32")
	}
	content, err := os.ReadFile(os.Args[1])
	if err != nil || len(content) != 4*size {
		log.Fatalf("the input does not hold %d floats (%v)", size, err)
	}
	input, relevance, scores := make([]float32, size), make([]float32, size), make([]float32, C.NET_CLASSES)
	for i := range input {
		input[i] = math.Float32frombits(binary.LittleEndian.Uint32(content[4*i:]))
	}
	workspace := C.aligned_alloc(C.NET_ALIGNMENT, (C.NET_WORKSPACE_BYTES+63)/64*64)
	defer C.free(workspace)
	var absorbed float32
	pointer := func(values []float32) *C.float { return (*C.float)(unsafe.Pointer(&values[0])) }
	code := C.net_explain(nil, pointer(input), -1, pointer(scores), pointer(relevance),
		(*C.float)(unsafe.Pointer(&absorbed)), workspace)
	if code != C.NET_OK {
		log.Fatal(C.GoString(C.net_error(code)))
	}
	winner, sum := 0, 0.0
	for i, score := range scores {
		if score > scores[winner] {
			winner = i
		}
	}
	for _, value := range relevance {
		sum += float64(value)
	}
	fmt.Printf("%s, score %.4f, relevance %.4f, absorbed %.4f\n", C.GoString(C.net_class_name(C.int(winner))),
		scores[winner], sum, absorbed)
}
