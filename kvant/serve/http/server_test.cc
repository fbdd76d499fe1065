#include "kvant/serve/http/server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <mutex>
#include <thread>

#include "kvant/serve/http/testing/client.h"

namespace kvant::serve::http {
namespace {

using namespace std::chrono_literals;
using testing::Client;
using testing::Reply;

class Watcher : public ServerObserver {
 public:
  void on_refused(int status, std::string_view) override { refused = status; }
  void on_written(double seconds) override {
    ++written;
    EXPECT_GE(seconds, 0);
  }
  void on_response(const AccessRecord& record) override {
    const std::lock_guard lock(mutex);
    records.push_back(record);
  }
  size_t num_records() {
    const std::lock_guard lock(mutex);
    return records.size();
  }
  void forget() {
    const std::lock_guard lock(mutex);
    records.clear();
  }
  AccessRecord last() {
    const std::lock_guard lock(mutex);
    return records.empty() ? AccessRecord{} : records.back();
  }
  std::atomic<int> refused{0};
  std::atomic<int> written{0};
  std::mutex mutex;
  std::vector<AccessRecord> records;
};

template <typename Condition>
bool wait_for(Condition condition) {
  for (int i = 0; i < 500; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(10ms);
  }
  return false;
}

class HttpServer : public ::testing::Test {
 protected:
  // Answers "METHOD PATH QUERY BODY"; /stream begins a stream that the test goes on with.
  void start(ServerOptions options = {}) {
    options.port = 0;
    auto started = Server::start(
        options,
        [this](std::shared_ptr<const HttpRequest> request, std::shared_ptr<ResponseWriter> writer) {
          if (request->path == "/throw") throw std::runtime_error("oops");
          if (request->path == "/drop") return;
          if (request->path == "/stream") {
            writer->begin({.content_type = "text/event-stream"});
            writer->on_closed([this] { ++left_; });
            stream_.set_value(std::move(writer));
            return;
          }
          writer->send({.content_type = "text/plain",
                        .body = request->method + " " + request->path + " " + request->query + " " +
                                request->body});
        },
        &watcher_);
    ASSERT_TRUE(started) << started.error().message();
    server_ = std::move(*started);
  }
  std::shared_ptr<ResponseWriter> stream() {
    auto future = stream_.get_future();
    EXPECT_EQ(future.wait_for(10s), std::future_status::ready);
    return future.get();
  }
  Client connect() const { return Client(server_->port()); }

  std::promise<std::shared_ptr<ResponseWriter>> stream_;
  std::atomic<int> left_{0};
  Watcher watcher_;
  std::unique_ptr<Server> server_;  // ends first
};

TEST_F(HttpServer, AnswersManyRequestsOnOneConnection) {
  start();
  Client client = connect();
  for (int i = 0; i < 3; ++i) {
    client.request("POST", "/a/b?x=1", "body");
    const Reply reply = client.reply();
    EXPECT_EQ(reply.status, 200);
    EXPECT_EQ(reply.body, "POST /a/b x=1 body");
    EXPECT_EQ(reply.header("Connection"), "keep-alive");
    EXPECT_FALSE(reply.header("X-Request-Id").empty());
  }
  EXPECT_TRUE(wait_for([&] { return watcher_.num_records() == 3; }));
  EXPECT_EQ(watcher_.last().status, 200);
  EXPECT_EQ(watcher_.last().bytes, 18);
}

TEST_F(HttpServer, PipelinedRequestsAreAnsweredInOrder) {
  start();
  Client client = connect();
  std::string all;
  for (int i = 0; i < 200; ++i) all += "GET /" + std::to_string(i) + " HTTP/1.1\r\n\r\n";
  client.send(all);
  for (int i = 0; i < 200; ++i) {
    ASSERT_EQ(client.reply().body, "GET /" + std::to_string(i) + "  ");
  }
}

TEST_F(HttpServer, EchoesRequestIdsThatAreSafe) {
  start();
  Client client = connect();
  client.request("GET", "/", {}, "x-request-id: abc-1\r\n");
  EXPECT_EQ(client.reply().header("X-Request-Id"), "abc-1");
  client.request("GET", "/", {}, "X-Request-Id: " + std::string(200, 'a') + "\r\n");
  EXPECT_LT(client.reply().header("X-Request-Id").size(), 100u);
}

TEST_F(HttpServer, HeadHasNoBodyAndOldClientsAreClosed) {
  start();
  Client client = connect();
  client.request("HEAD", "/x");
  const Reply head = client.reply(10'000, false);
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.header("Content-Length"), "9");
  client.send("GET /old HTTP/1.0\r\n\r\n");
  EXPECT_EQ(client.reply().body, "GET /old  ");
  EXPECT_TRUE(client.receive_end());
}

TEST_F(HttpServer, WaitsForTheBodyOfClientsThatAsk) {
  start();
  Client client = connect();
  client.send("POST / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_TRUE(client.receive_until("100 Continue"));
  client.send("abc");
  EXPECT_EQ(client.reply().body, "POST /  abc");
}

TEST_F(HttpServer, ReadsChunkedBodies) {
  start();
  Client client = connect();
  client.send(
      "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
  EXPECT_EQ(client.reply().body, "POST /  abcde");
}

TEST_F(HttpServer, RefusesWhatIsTooLargeOrNotHttp) {
  start({.max_header_bytes = 1024, .max_body_bytes = 1000});
  const auto refused = [&](std::string_view bytes) {
    Client client = connect();
    client.send(bytes);
    const Reply reply = client.reply();
    EXPECT_TRUE(client.receive_end());
    EXPECT_NE(reply.body.find("\"error\""), std::string::npos) << reply.body;
    return reply.status;
  };
  EXPECT_EQ(refused("GET / HTTP/1.1\r\nX: " + std::string(5000, 'a') + "\r\n\r\n"), 431);
  EXPECT_EQ(refused("GET /" + std::string(5000, 'a')), 431);
  EXPECT_EQ(refused("POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n" + std::string(1001, 'a')),
            413);
  EXPECT_EQ(refused("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n" +
                    std::string(0x800, 'a')),
            413);
  EXPECT_EQ(refused("hello\r\n\r\n"), 400);
  EXPECT_EQ(refused("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"), 400);
  EXPECT_EQ(refused("GET / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"),
            400);
  EXPECT_EQ(refused("GET / HTTP/9.9\r\n\r\n"), 505);
  EXPECT_EQ(watcher_.refused, 505);
}

TEST_F(HttpServer, ALargeBodyThatIsRefusedStillGetsItsAnswer) {
  start();
  Client client = connect();
  // Far more than socket buffers hold: the server must read on for send() to return.
  client.request("POST", "/", std::string(20 << 20, 'a'));
  EXPECT_EQ(client.reply().status, 413);
}

TEST_F(HttpServer, BodiesTogetherHoldLimitedMemory) {
  start({.max_bodies_bytes = 3000});
  Client first = connect();
  first.send("POST / HTTP/1.1\r\nContent-Length: 2500\r\n\r\n" + std::string(2000, 'a'));
  std::this_thread::sleep_for(100ms);
  Client second = connect();
  second.request("POST", "/", std::string(2000, 'b'));
  EXPECT_EQ(second.reply().status, 503);
  first.send(std::string(500, 'a'));
  EXPECT_EQ(first.reply().status, 200);
  EXPECT_TRUE(wait_for([&] { return watcher_.num_records() == 1; }));
  watcher_.forget();  // records hold requests
  Client third = connect();
  third.request("POST", "/", std::string(2000, 'b'));
  EXPECT_EQ(third.reply().status, 200);
}

TEST_F(HttpServer, SlowRequestsTimeOut) {
  start({.header_timeout = 200ms, .body_timeout = 200ms, .idle_timeout = 200ms});
  Client slow = connect();
  const auto begun = Clock::now();
  std::thread dripping([&] {
    for (const char c : std::string("GET / HTTP/1.1\r\nX-A: bcdefghijklmnopqrst")) {
      if (!slow.send({&c, 1})) return;
      std::this_thread::sleep_for(20ms);
    }
  });
  EXPECT_EQ(slow.reply().status, 408);
  dripping.join();
  EXPECT_LT(Clock::now() - begun, 5s);
  Client body = connect();
  body.send("POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc");
  EXPECT_EQ(body.reply().status, 408);
  Client idle = connect();
  idle.request("GET", "/");
  EXPECT_EQ(idle.reply().status, 200);
  EXPECT_TRUE(idle.receive_end());
  Client silent = connect();
  EXPECT_TRUE(silent.receive_end());
}

TEST_F(HttpServer, StreamsPiecesFromAnotherThread) {
  start();
  Client client = connect();
  client.request("GET", "/stream");
  auto writer = stream();
  ASSERT_TRUE(client.receive_until("chunked"));
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(writer->write("data: " + std::to_string(i) + "\n\n"));
  ASSERT_TRUE(client.receive_until("data: 99"));
  writer->end();
  const Reply reply = client.reply();
  EXPECT_TRUE(reply.complete);
  EXPECT_EQ(reply.body.substr(0, 18), "data: 0\n\ndata: 1\n\n");
  EXPECT_FALSE(writer->write("x"));
  client.request("GET", "/next");
  EXPECT_EQ(client.reply().body, "GET /next  ");
  EXPECT_EQ(left_, 0);
  EXPECT_GT(watcher_.written, 0);
}

TEST_F(HttpServer, NoticesAClientThatLeaves) {
  start();
  Client client = connect();
  client.request("GET", "/stream");
  auto writer = stream();
  EXPECT_FALSE(writer->closed());
  client.close();
  EXPECT_TRUE(wait_for([&] { return left_ == 1; }));
  EXPECT_TRUE(writer->closed());
  EXPECT_FALSE(writer->write("x"));
  EXPECT_TRUE(watcher_.last().client_left);
  int late = 0;
  writer->on_closed([&] { ++late; });
  EXPECT_EQ(late, 1);
  EXPECT_TRUE(wait_for([&] { return server_->connections() == 0; }));
}

TEST_F(HttpServer, CutsAReaderThatFallsBehind) {
  start({.max_unsent_bytes = 256 << 10});
  Client client(server_->port(), 4096);
  client.request("GET", "/stream");
  auto writer = stream();
  bool open = true;
  size_t written = 0;
  // Socket buffers take some megabytes; more than that must not be kept.
  for (int i = 0; open && i < 2000; ++i) {
    open = writer->write(std::string(64 << 10, 'x'));
    written += 64 << 10;
  }
  EXPECT_FALSE(open);
  EXPECT_LT(written, size_t{64} << 20);
  EXPECT_TRUE(wait_for([&] { return left_ == 1; }));
  EXPECT_EQ(watcher_.last().cut_by, "slow reader");
}

TEST_F(HttpServer, AStalledReaderTimesOut) {
  start({.max_unsent_bytes = 64 << 20, .write_timeout = 300ms});
  Client client(server_->port(), 4096);
  client.request("GET", "/stream");
  auto writer = stream();
  writer->write(std::string(16 << 20, 'x'));
  EXPECT_TRUE(wait_for([&] { return left_ == 1; }));
  EXPECT_EQ(watcher_.last().cut_by, "write timeout");
}

TEST_F(HttpServer, RefusesConnectionsBeyondTheLimit) {
  start({.max_connections = 2});
  Client first = connect();
  Client second = connect();
  EXPECT_TRUE(wait_for([&] { return server_->connections() == 2; }));
  Client third = connect();
  const Reply reply = third.reply();
  EXPECT_EQ(reply.status, 503);
  EXPECT_EQ(reply.header("Retry-After"), "1");
  first.close();
  third.close();
  EXPECT_TRUE(wait_for([&] { return server_->connections() == 1; }));
  Client fourth = connect();
  fourth.request("GET", "/");
  EXPECT_EQ(fourth.reply().status, 200);
}

TEST_F(HttpServer, HandlersThatFailOrForgetAreAnsweredFor) {
  start();
  Client client = connect();
  client.request("GET", "/throw");
  EXPECT_EQ(client.reply().status, 500);
  client.request("GET", "/drop");
  EXPECT_EQ(client.reply().status, 500);
}

TEST_F(HttpServer, DrainsStreamsAndTurnsAwayTheRest) {
  start();
  Client idle = connect();
  Client client = connect();
  client.request("GET", "/stream");
  auto writer = stream();
  auto drained = std::async(std::launch::async, [&] { return server_->drain(10s); });
  EXPECT_TRUE(idle.receive_end());
  EXPECT_TRUE(wait_for([&] { return !connect().connected(); }));
  writer->write("last");
  writer->end();
  EXPECT_EQ(client.reply().body, "last");
  EXPECT_TRUE(client.receive_end());
  client.close();
  EXPECT_TRUE(drained.get());
}

TEST_F(HttpServer, DrainCutsWhatDoesNotEnd) {
  start();
  Client client = connect();
  client.request("GET", "/stream");
  auto writer = stream();
  EXPECT_FALSE(server_->drain(100ms));
  EXPECT_TRUE(writer->closed());
  EXPECT_EQ(left_, 1);
  server_.reset();
  EXPECT_FALSE(writer->write("the writer outlives the server"));
}

TEST_F(HttpServer, SaysWhyItCannotListen) {
  start();
  const auto handler = [](auto, auto) {};
  auto taken = Server::start({.port = server_->port()}, handler);
  ASSERT_FALSE(taken);
  EXPECT_EQ(taken.error().code(), ErrorCode::kIoError);
  EXPECT_NE(taken.error().message().find("choose another port"), std::string::npos);
  auto unknown = Server::start({.host = "no.such.host.invalid", .port = 0}, handler);
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().code(), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(Server::start({.host = "192.0.2.1", .port = 0}, handler));
}

TEST_F(HttpServer, ManyClientsThatComeAndGo) {
  start({.num_threads = 2});
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        Client client = connect();
        client.request("POST", "/x", "y");
        if ((i + t) % 5 == 0) continue;  // leaves before the answer
        if (client.reply().status == 200) ++good;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 8 * 40);
  EXPECT_TRUE(wait_for([&] { return server_->connections() == 0; }));
}

TEST(Message, DecodesQueries) {
  EXPECT_EQ(decode_percent("a%20b+c%zz%4", true), "a b c%zz%4");
  EXPECT_EQ(query_value("a=1&b=%C3%A9&c", "b"), "é");
  EXPECT_EQ(query_value("a=1&c", "c"), "");
  EXPECT_EQ(query_value("aa=1", "a"), "");
}

}  // namespace
}  // namespace kvant::serve::http
